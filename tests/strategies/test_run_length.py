"""How many optimizer steps a run has, where Lightning's estimate is another number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.strategies import CompressionStrategy, NoCompression, RankDyna
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import Sample, SyntheticData, collate

Make = Callable[[], CompressionStrategy]
either = pytest.mark.parametrize("make", [NoCompression, lambda: RankDyna(keep_ratio=0.4)], ids=["none", "rankdyna"])


class Stream(IterableDataset[Sample]):
    """Samples of which nobody knows how many there are."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)


class StreamedData(SyntheticData):
    def train_dataloader(self) -> DataLoader[Sample]:
        return DataLoader(Stream(self.train), self.batch_size, collate_fn=collate)


@either
def test_a_stream_needs_a_number_of_steps(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    """Lightning tells -1 for its length, over which the default schedule would be zero throughout."""
    trainer = make_trainer(tmp_path, max_epochs=2)
    with pytest.raises(MissingArgumentError, match=r"trainer\.max_steps"):
        trainer.fit(make_task(tiny_bert, make()), datamodule=StreamedData())


@either
@pytest.mark.parametrize("arguments", [{"max_steps": 12}, {"limit_train_batches": 6}], ids=str)
def test_a_stream_of_known_length_trains(tiny_bert: str, tmp_path: Path, make: Make, arguments: dict[str, Any]) -> None:
    task = make_task(tiny_bert, make())
    trainer = make_trainer(tmp_path, max_epochs=2, **arguments)
    rates: list[float] = []
    task.on_before_zero_grad = lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])
    trainer.fit(task, datamodule=StreamedData())
    assert trainer.global_step == 12
    assert max(rates) > 0
    assert task.at_budget


def test_a_stream_of_any_length_trains_with_a_schedule_of_its_own(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert, scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer))
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(task, datamodule=StreamedData())
    assert trainer.global_step == 12


@either
@pytest.mark.parametrize(("scheduling", "steps"), [({1: 6}, 9), ({0: 6, 2: 1}, 14), ({0: 4}, 8)], ids=str)
def test_steps_are_those_of_every_epoch_by_its_own_accumulation(
    tiny_bert: str, tmp_path: Path, make: Make, scheduling: dict[int, int], steps: int
) -> None:
    """Four epochs of six batches: rates fall until the last step, and ranks until half of the run."""
    task = make_task(tiny_bert, make())
    trainer = make_trainer(tmp_path, max_epochs=4, callbacks=[GradientAccumulationScheduler(scheduling)])
    trainer.fit(task, datamodule=SyntheticData())
    assert trainer.global_step == steps
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.0, 0.0]
    if isinstance(task.strategy, RankDyna):
        assert task.strategy.state.history[-1].step == steps - round(0.5 * steps)
