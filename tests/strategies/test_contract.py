"""What every strategy owes to Lightning and to the user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    "fwsvd_global": lambda: FWSVD(keep_ratio=0.5, allocation=Global()),
    "rankdyna": lambda: RankDyna(keep_ratio=0.5),
    "rankdyna_first_order": lambda: RankDyna(keep_ratio=0.5, sensitivity=FirstOrder()),
    "rankdyna_triplet": lambda: RankDyna(
        keep_ratio=0.4, schedule=CubicSchedule(rewarmup=0.1), sensitivity=Triplet(), per_parameter=False
    ),
    "rankdyna_dense": lambda: RankDyna(keep_ratio=0.8, sensitivity=FirstOrder(), multiple_of=2),
    "rankdyna_diagonal": lambda: RankDyna(keep_ratio=0.8, sensitivity=KroneckerSensitivity(diagonal=True)),
}


# Resumed from every single step, of so many samples. A static method is a fixed model once it trains: one with the most
# in its checkpoint stands for all of them. A learning rate that rises anew after reallocations takes many steps; what a
# sensitivity keeps is the same after few.
EVERY_STEP = {"none": 24, "kronecker": 24, "rankdyna": 24, "rankdyna_triplet": 48, "rankdyna_dense": 24}


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


class Snapshot(pl.Callback):
    """All parameters before the first step and after the last."""

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


@dataclass
class Fitted:
    """A run of one epoch and what was seen in it; tests only look at it."""

    task: Any
    data: SyntheticData
    trace: Trace
    parameters: Parameters
    snapshot: Snapshot
    checkpoint: str
    loss: float


@pytest.fixture(scope="module", params=list(STRATEGIES))
def fitted(request: pytest.FixtureRequest, tiny_bert: str, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp(name)
        patch.setenv("LOWRANK_PL_CACHE", str(folder / "cache"))
        task, data = make_task(tiny_bert, STRATEGIES[name]()), SyntheticData()
        trace, parameters, snapshot = Trace(task.strategy), Parameters(), Snapshot()
        trainer = make_trainer(folder, callbacks=[trace, parameters, snapshot])
        trainer.fit(task, datamodule=data)
    loss = float(trainer.callback_metrics["val/loss"])
    return Fitted(task, data, trace, parameters, snapshot, last_checkpoint(trainer), loss)


def test_hook_trace(fitted: Fitted) -> None:
    assert fitted.trace.events == [
        "strategy.check_run",  # checks come first
        "strategy.prepare",
        "strategy.check_run",
        "strategy.on_train_start",
        "epoch",
        *["strategy.on_before_optimizer_step", "strategy.on_train_batch_end"] * 6,
        "checkpoint",
    ]


def test_parameters_are_the_same_objects_and_all_trained(fitted: Fitted) -> None:
    assert fitted.parameters.at_end == fitted.parameters.at_setup
    assert fitted.parameters.in_optimizer == set(fitted.parameters.at_setup)


def test_every_factor_moves_in_training(fitted: Fitted) -> None:
    before, after = fitted.snapshot.before, fitted.snapshot.after
    still = [name for name, p in after.items() if torch.equal(p, before[name]) and "position" not in name]
    assert [name for name in still if "token_type" not in name] == []


def test_loads_without_the_strategy(fitted: Fitted) -> None:
    task = fitted.task
    loaded = SequenceClassification.load_from_checkpoint(fitted.checkpoint, weights_only=True)
    batch = next(iter(fitted.data.val_dataloader()))
    assert torch.equal(loaded.eval()(batch), task.eval()(batch))
    assert read_layout(loaded.encoder) == read_layout(task.encoder)
    assert loaded.target == task.target
    assert loaded.compression == task.compression


def test_tests_from_a_checkpoint_as_trained(tiny_bert: str, fitted: Fitted, tmp_path: Path) -> None:
    fresh = SequenceClassification(tiny_bert)
    results = make_trainer(tmp_path).test(fresh, fitted.data, ckpt_path=fitted.checkpoint, verbose=False)
    assert results[0]["test/loss"] == pytest.approx(fitted.loss, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in EVERY_STEP])
def test_resumes_bit_for_bit(tiny_bert: str, tmp_path: Path, name: str) -> None:
    """From the end of the first epoch, where a checkpoint is the same whether the run then goes on or is stopped."""

    def fit(folder: Path, resume: str | None) -> tuple[Any, pl.Trainer]:
        task = make_task(tiny_bert, STRATEGIES[name]())
        saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        keeping: dict[str, Any] = {"enable_checkpointing": False} if resume else {"callbacks": [saver]}
        trainer = make_trainer(folder, max_epochs=3, limit_train_batches=3, **keeping)
        trainer.fit(task, datamodule=OrderedData(), ckpt_path=resume)
        return task, trainer

    whole, _ = fit(tmp_path / "whole", None)
    resumed, trainer = fit(tmp_path / "resumed", str(tmp_path / "whole" / "epoch=0.ckpt"))
    assert trainer.global_step == 9
    state = resumed.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in whole.state_dict().items())


@pytest.mark.parametrize(("name", "size"), list(EVERY_STEP.items()))
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
