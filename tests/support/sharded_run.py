"""Trains a factorised decoder for an epoch: `sharded_run.py MODEL FOLDER PROCESSES`.

Two processes with the variables of a launcher divide the model among them (FSDP2), one has it whole. Run in this
process for one, so that a test may compare them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

sys.path.insert(0, str(Path(__file__).parents[2]))

from lowrank_pl.data import CausalText
from lowrank_pl.strategies import SVD
from lowrank_pl.surgery import TargetSelector
from lowrank_pl.tasks import CausalLM
from lowrank_pl.tasks.sharding import is_sharded
from tests.support.runs import make_trainer


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """With a state, and without AdamW's division, which turns rounding into steps."""
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def run(model: str, folder: Path, processes: int, resumed: Path | None = None) -> Path:
    """An epoch with validation, or a second one after that of a checkpoint; returns its checkpoint."""
    epochs = 1 if resumed is None else 2
    parallel = {} if processes == 1 else {"strategy": divided(processes), "devices": processes}
    checkpoint = ModelCheckpoint(folder, filename=f"epoch-{epochs}", monitor="val/score", mode="min")
    trainer = make_trainer(
        folder, logger=False, max_epochs=epochs, callbacks=[checkpoint], gradient_clip_val=1.0, **parallel
    )
    strategy = SVD(keep_ratio=0.5, targets=TargetSelector(embeddings=True))
    task = CausalLM(model, strategy=strategy, optimizer=optimizer)
    text = str(Path(model).parent / "text.txt")
    data = CausalText(model, train=text, validation=text, window=8, batch_size=8 // processes, eval_batch_size=1)
    trainer.fit(task, data, ckpt_path=None if resumed is None else str(resumed))
    assert is_sharded(task.encoder) == (processes > 1)
    return folder / f"epoch-{epochs}.ckpt"


def divided(processes: int) -> ModelParallelStrategy:
    return ModelParallelStrategy(processes, tensor_parallel_size=1, save_distributed_checkpoint=False)


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
