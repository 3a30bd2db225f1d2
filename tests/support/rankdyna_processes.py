"""Trains and saves ranks and parameters after every step: `rankdyna_processes.py FOLDER MODEL DEVICES SCORE`.

With a fifth word, `resumed`, also from the checkpoint of the first epoch on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[2]))

from lowrank_pl import importance
from lowrank_pl.allocation import CubicSchedule
from lowrank_pl.nn import forms_in_training
from lowrank_pl.strategies import RankDyna
from lowrank_pl.tasks import SequenceClassification
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import SyntheticData, collate

GLOBAL_BATCH = 8


class SharedBatches(SyntheticData):
    """The same samples in every step, however many processes share them."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        mine: Any = self.train[rank::processes]
        return DataLoader(mine, GLOBAL_BATCH // processes, collate_fn=collate)


class Recorder(pl.Callback):
    """Everything after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self._record(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._record(pl_module)

    def _record(self, pl_module: SequenceClassification) -> None:
        layers = forms_in_training(pl_module.encoder)
        ranks = {name: layer.rank for name, layer in layers.items()}
        state = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        # Factors of one product may differ by signs; everything else has to be the same.
        inside = tuple(f"encoder.{name}." for name in layers)
        products = {name: tensor for name, tensor in state.items() if not name.startswith(inside)}
        products |= {name: layer.product().detach().clone() for name, layer in layers.items()}
        self.steps.append({"ranks": ranks, "state": state, "products": products})


def run(
    folder: Path,
    pretrained: str,
    devices: int,
    score: str,
    schedule: CubicSchedule | None = None,
    resumed: bool = False,
) -> None:
    """One run; every process saves what it saw."""
    schedule = schedule or CubicSchedule(0.0, 0.3, 0.1)
    strategy = RankDyna(keep_ratio=0.3, schedule=schedule, sensitivity=getattr(importance, score)())
    task = make_task(pretrained, strategy, optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
    recorder = Recorder()
    every = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, enable_version_counter=False)
    arguments: dict[str, Any] = {"devices": devices, "callbacks": [recorder, every], "logger": False, "max_epochs": 2}
    if devices > 1:
        arguments |= {"strategy": "ddp", "use_distributed_sampler": False}
    trainer = make_trainer(folder, **arguments)

    class NoDropout(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for module in pl_module.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0

    trainer.callbacks.append(NoDropout())
    trainer.fit(task, datamodule=SharedBatches(), ckpt_path=str(folder / "epoch=0.ckpt") if resumed else None)
    name = f"{'resumed' if resumed else 'devices'}-{devices}-rank-{trainer.global_rank}.pt"
    torch.save(recorder.steps, folder / name)


if __name__ == "__main__":
    words = (Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
    if sys.argv[5:] == ["resumed"]:
        # Reallocations after steps 9 and 11; what is observed before the end of the first epoch counts for both.
        halfway = CubicSchedule(0.5, 0.1, 0.25)
        run(*words, halfway)
        run(*words, halfway, resumed=True)
    else:
        run(*words)
