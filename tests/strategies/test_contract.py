"""What every strategy owes to Lightning and to the user."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lowrank_pl.allocation import CubicSchedule, Global, Uniform
from lowrank_pl.data.resuming import ResumableData
from lowrank_pl.errors.run import BudgetNotReachedError
from lowrank_pl.importance import FirstOrder, KroneckerSensitivity, Triplet
from lowrank_pl.nn import LowRankLinear
from lowrank_pl.strategies import (
    FWSVD,
    SVD,
    TFWSVD,
    CompressionStrategy,
    KroneckerSVD,
    NoCompression,
    RankDyna,
    Recalibration,
)
from lowrank_pl.surgery import read_layout
from lowrank_pl.tasks import SequenceClassification
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData, collate

Make = Callable[[], CompressionStrategy]

STRATEGIES: dict[str, Make] = {
    "none": NoCompression,
    "svd": lambda: SVD(keep_ratio=0.5),
    "svd_rank_ratio": lambda: SVD(rank_ratio=0.2),
    "fwsvd_both": lambda: FWSVD("both", keep_ratio=0.5),
    "tfwsvd": lambda: TFWSVD(keep_ratio=0.5),
    "kronecker": lambda: KroneckerSVD(keep_ratio=0.5, recalibration=Recalibration()),
    "kronecker_uniform": lambda: KroneckerSVD("output", keep_ratio=0.5, allocation=Uniform()),
    "fwsvd_global_pivoted": lambda: FWSVD(keep_ratio=0.5, allocation=Global(), form="pivoted"),
    "rankdyna": lambda: RankDyna(keep_ratio=0.5),
    "rankdyna_first_order": lambda: RankDyna(keep_ratio=0.5, sensitivity=FirstOrder()),
    "rankdyna_triplet": lambda: RankDyna(
        keep_ratio=0.4, schedule=CubicSchedule(rewarmup=0.1), sensitivity=Triplet(), per_parameter=False
    ),
    "rankdyna_dense": lambda: RankDyna(keep_ratio=0.8, sensitivity=FirstOrder(), multiple_of=2),
    "rankdyna_diagonal": lambda: RankDyna(
        keep_ratio=0.8, sensitivity=KroneckerSensitivity(diagonal=True), form="pivoted"
    ),
}


@pytest.fixture(params=list(STRATEGIES.values()), ids=list(STRATEGIES))
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


class Trace(pl.Callback):
    """Writes down the strategy's hooks and the events around them."""

    def __init__(self, strategy: CompressionStrategy) -> None:
        self.events: list[str] = []
        for name in ("prepare", "check_run", "on_train_start", "on_before_optimizer_step", "on_train_batch_end"):
            setattr(strategy, name, self._traced(name, getattr(strategy, name)))

    def _traced(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.events.append(f"strategy.{name}")
            return hook(*args, **kwargs)

        return wrapper

    def on_save_checkpoint(self, *args: Any) -> None:
        self.events.append("checkpoint")

    def on_train_epoch_start(self, *args: Any) -> None:
        self.events.append("epoch")


class Parameters(pl.Callback):
    """The identities of all parameters after `configure_model` and at the end."""

    def __init__(self) -> None:
        self.at_setup: list[int] = []
        self.at_end: list[int] = []
        self.in_optimizer: set[int] = set()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.at_setup = [id(p) for p in pl_module.parameters()]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.at_end = [id(p) for p in pl_module.parameters()]
        self.in_optimizer = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}


def test_hook_trace(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    task = make_task(tiny_bert, make())
    trace = Trace(task.strategy)
    trainer = make_trainer(tmp_path, callbacks=[trace], limit_train_batches=2)
    trainer.fit(task, datamodule=SyntheticData())
    assert trace.events == [
        "strategy.check_run",  # checks come first
        "strategy.prepare",
        "strategy.check_run",
        "strategy.on_train_start",
        "epoch",
        "strategy.on_before_optimizer_step",
        "strategy.on_train_batch_end",
        "strategy.on_before_optimizer_step",
        "strategy.on_train_batch_end",
        "checkpoint",
    ]


def test_parameters_are_the_same_objects_and_all_trained(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    task, parameters = make_task(tiny_bert, make()), Parameters()
    make_trainer(tmp_path, callbacks=[parameters]).fit(task, datamodule=SyntheticData())
    assert parameters.at_end == parameters.at_setup
    assert parameters.in_optimizer == set(parameters.at_setup)


def test_every_factor_moves_in_training(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    task = make_task(tiny_bert, make())

    class Snapshot(pl.Callback):
        before: dict[str, torch.Tensor]
        after: dict[str, torch.Tensor]

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.after = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    snapshot = Snapshot()
    make_trainer(tmp_path, callbacks=[snapshot]).fit(task, datamodule=SyntheticData())
    still = [n for n, p in snapshot.after.items() if torch.equal(p, snapshot.before[n]) and "position" not in n]
    assert [name for name in still if "token_type" not in name] == []


def test_loads_without_the_strategy(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    task, data = make_task(tiny_bert, make()), SyntheticData()
    trainer = make_trainer(tmp_path)
    trainer.fit(task, datamodule=data)
    loaded = SequenceClassification.load_from_checkpoint(last_checkpoint(trainer), weights_only=True)
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(loaded.eval()(batch), task.eval()(batch))
    assert read_layout(loaded.encoder) == read_layout(task.encoder)
    assert loaded.target == task.target
    assert loaded.compression == task.compression


def test_tests_from_a_checkpoint_as_trained(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    task, data = make_task(tiny_bert, make()), SyntheticData()
    trainer = make_trainer(tmp_path)
    trainer.fit(task, datamodule=data)
    expected = trainer.callback_metrics["val/loss"]
    fresh = SequenceClassification(tiny_bert)
    results = make_trainer(tmp_path).test(fresh, data, ckpt_path=last_checkpoint(trainer), verbose=False)
    assert results[0]["test/loss"] == pytest.approx(float(expected), abs=1e-6)


def test_resumes_bit_for_bit(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    def fit(folder: Path, resume: str | None, stop: int | None) -> tuple[Any, pl.Trainer]:
        task = make_task(tiny_bert, make())
        trainer = make_trainer(folder, max_epochs=3, limit_train_batches=3)
        if stop is not None:
            trainer.callbacks.append(StopAfter(stop))
        with suppress(BudgetNotReachedError):  # what a run says that is stopped on the way
            trainer.fit(task, datamodule=OrderedData(), ckpt_path=resume)
        return task, trainer

    whole, _ = fit(tmp_path / "whole", None, None)
    _, stopped = fit(tmp_path / "stopped", None, 1)
    resumed, trainer = fit(tmp_path / "resumed", last_checkpoint(stopped), None)
    assert trainer.global_step == 9
    state = resumed.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())


# A static method is a fixed model once it trains: one with the most in its checkpoint stands for all of them.
@pytest.mark.parametrize(
    ("name", "size"),
    [("none", 24), ("kronecker", 24), ("rankdyna", 48), ("rankdyna_triplet", 48), ("rankdyna_dense", 24)],
)
def test_resumes_from_every_single_step(tiny_bert: str, tmp_path: Path, name: str, size: int) -> None:
    """Mid-epoch too, given a loader that remembers its place."""

    def fit(folder: Path, resume: str | None) -> Any:
        task = make_task(tiny_bert, STRATEGIES[name]())
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        keeping: dict[str, Any] = {"enable_checkpointing": False} if resume else {"callbacks": [saver]}
        trainer = make_trainer(folder, max_epochs=2, **keeping)
        trainer.fit(task, datamodule=StatefulData(size=size), ckpt_path=resume)
        return task.state_dict()

    whole = fit(tmp_path / "whole", None)
    checkpoints = sorted((tmp_path / "whole").glob("step=*.ckpt"))
    assert len(checkpoints) == size // 4
    for checkpoint in checkpoints:
        resumed = fit(tmp_path / f"from-{checkpoint.stem}", str(checkpoint))
        different = [name for name, tensor in whole.items() if not torch.equal(tensor, resumed[name])]
        assert different == [], checkpoint.stem


class StatefulData(SyntheticData, ResumableData):
    """In another order in every epoch, by loaders that remember their place and leave the global random state alone."""

    def train_dataloader(self) -> Any:
        data: Any = self.train
        sampler: Any = DistributedSampler(data, 1, 0)
        generator = torch.Generator().manual_seed(0)
        loader = StatefulDataLoader(data, self.batch_size, sampler=sampler, collate_fn=collate, generator=generator)
        return self.resumable(loader)

    def val_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(self.validation, self.batch_size, collate_fn=collate, generator=generator)  # type: ignore[arg-type]


class StopAfter(pl.Callback):
    """Ends a run after some epochs, as an interruption would: the schedule still spans all of them."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


class OrderedData(SyntheticData):
    """Training data in a fixed order, by a loader that leaves the global random state alone."""

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(self.train, self.batch_size, collate_fn=collate, generator=generator)  # type: ignore[arg-type]


def test_accumulation_calls_the_optimizer_hook_once_per_step(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    task = make_task(tiny_bert, make())
    trace = Trace(task.strategy)
    trainer = make_trainer(tmp_path, callbacks=[trace], limit_train_batches=4, accumulate_grad_batches=2)
    trainer.fit(task, datamodule=SyntheticData())
    assert trainer.global_step == trace.events.count("strategy.on_before_optimizer_step") == 2


def test_bf16_mixed_and_frozen_embeddings(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    class Frozen(SequenceClassification):
        def configure_model(self) -> None:
            super().configure_model()
            self.encoder.get_input_embeddings().requires_grad_(False)

    task = Frozen(tiny_bert, strategy=make())
    trainer = make_trainer(tmp_path, precision="bf16-mixed", limit_train_batches=2)
    trainer.fit(task, datamodule=SyntheticData())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    factors = [p for m in task.encoder.modules() if isinstance(m, LowRankLinear) for p in m.parameters()]
    assert all(p.dtype == torch.float32 for p in factors)


def test_gradient_checkpointing(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    class Checkpointed(SequenceClassification):
        def configure_model(self) -> None:
            super().configure_model()
            self.encoder.gradient_checkpointing_enable()

    trainer = make_trainer(tmp_path, limit_train_batches=2)
    trainer.fit(Checkpointed(tiny_bert, strategy=make()), datamodule=SyntheticData())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
