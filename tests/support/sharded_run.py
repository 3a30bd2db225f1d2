"""Trains a factorised decoder, stops, and resumes: `sharded_run.py MODEL FOLDER PROCESSES`.

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

from lowrank_pl.strategies import SVD
from lowrank_pl.surgery import TargetSelector
from lowrank_pl.tasks import CausalLM
from lowrank_pl.tasks.sharding import is_sharded
from tests.support.runs import make_trainer
from tests.support.synthetic import SyntheticData


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """With a state, and without AdamW's division, which turns rounding into steps."""
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def run(model: str, folder: Path, processes: int) -> None:
    """Two epochs in two runs, both with validation on a number of samples that two processes cannot halve."""
    for epochs in (1, 2):
        parallel = {} if processes == 1 else {"strategy": divided(processes), "devices": processes}
        checkpoint = ModelCheckpoint(folder, filename=f"epoch-{epochs}", monitor="val/score", mode="min")
        trainer = make_trainer(
            folder, logger=False, max_epochs=epochs, callbacks=[checkpoint], gradient_clip_val=1.0, **parallel
        )
        strategy = SVD(keep_ratio=0.5, targets=TargetSelector(embeddings=True))
        task = CausalLM(model, strategy=strategy, optimizer=optimizer)
        before = str(folder / f"epoch-{epochs - 1}.ckpt") if epochs > 1 else None
        data = SyntheticData("causal_lm", size=16, batch_size=8 // processes, validation_size=5)
        trainer.fit(task, data, ckpt_path=before)
        assert is_sharded(task.encoder) == (processes > 1)


def divided(processes: int) -> ModelParallelStrategy:
    return ModelParallelStrategy(processes, tensor_parallel_size=1, save_distributed_checkpoint=False)


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
