"""Runs that follow each other: every order in which a user may build, load, validate, compress and fit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lowrank_pl.contract import TargetSpec
from lowrank_pl.errors.budget import AlreadyCompactedError, BudgetNotReachedError, NoTrainingStepError
from lowrank_pl.errors.checkpoint import CheckpointMismatchError
from lowrank_pl.errors.targets import NoTargetError
from lowrank_pl.nn import LowRankLinear, SVDLinear
from lowrank_pl.strategies import FWSVD, SVD, CompressionStrategy, RankDyna
from lowrank_pl.surgery import read_layout
from lowrank_pl.tasks import SequenceClassification
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData

Make = Callable[[], CompressionStrategy]
# SVD does a part of what FWSVD does before training, and the same from then on.
STRATEGIES: dict[str, Make] = {
    "fwsvd": lambda: FWSVD("both", keep_ratio=0.5),
    "rankdyna": lambda: RankDyna(keep_ratio=0.4),
}
TARGET = SyntheticData().target


@pytest.fixture(params=list(STRATEGIES.values()), ids=list(STRATEGIES))
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


def fit(task: Any, folder: Path, **arguments: Any) -> pl.Trainer:
    path = arguments.pop("ckpt_path", None)
    trainer = make_trainer(folder, **{"limit_train_batches": 3, **arguments})
    trainer.fit(task, datamodule=SyntheticData(), ckpt_path=path)
    return trainer


def kept(task: Any) -> float:
    """What is kept of the targeted weights, by counting."""
    layers = [m for m in task.encoder.modules() if isinstance(m, LowRankLinear)]
    assert len(layers) == 12
    assert not any(isinstance(m, SVDLinear) for m in task.encoder.modules())
    assert all(bool(m.left.weight.any()) for m in layers)
    return sum(m.left.weight.numel() + m.right.weight.numel() for m in layers) / 16384


def test_validate_then_fit(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    task = make_task(tiny_bert, make())
    make_trainer(tmp_path).validate(task, SyntheticData(), verbose=False)
    assert not read_layout(task.encoder).modules
    assert task.encoder.training
    fit(task, tmp_path)
    assert kept(task) <= 0.5
    assert task.compression.method == type(task.strategy).__name__


def test_build_then_fit(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    task = make_task(tiny_bert, make())
    task.build()
    fit(task, tmp_path)
    assert kept(task) <= 0.5
    assert task.target == TARGET
    assert task.encoder.config.id2label == {0: "no", 1: "yes"}


def test_an_encoder_built_for_other_labels_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert)
    task.build(TargetSpec("seasons", "classification", ("a", "b", "c", "d")))
    with pytest.raises(CheckpointMismatchError, match=r"the encoder that the task holds.*predicts 4 labels"):
        fit(task, tmp_path)


def test_load_a_dense_checkpoint_then_fit(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    path = last_checkpoint(fit(make_task(tiny_bert), tmp_path))
    task = SequenceClassification.load_from_checkpoint(path, strategy=make(), weights_only=True)
    fit(task, tmp_path)
    assert kept(task) <= 0.5


def test_compress_then_fit_tunes_what_was_compressed(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert, SVD(keep_ratio=0.5))
    make_trainer(tmp_path).compress(task, SyntheticData(), str(tmp_path / "out"))
    record, ranks = task.compression, read_layout(task.encoder)
    trainer = fit(task, tmp_path)
    assert trainer.global_step == 3
    assert task.compression == record
    assert read_layout(task.encoder) == ranks


def test_fit_test_fit_goes_on_at_the_same_ranks(
    tiny_bert: str, tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    task = make_task(tiny_bert, make())
    trainer = fit(task, tmp_path)
    path, ranks, record = last_checkpoint(trainer), read_layout(task.encoder), task.compression
    trainer.test(task, SyntheticData(), ckpt_path=path, verbose=False)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    with caplog.at_level(logging.INFO):
        fit(task, tmp_path, max_epochs=2)
    assert read_layout(task.encoder) == ranks
    assert task.compression.layers == record.layers
    assert task.at_budget
    assert any(not torch.equal(p, before[name]) for name, p in task.named_parameters() if name.endswith(".left.weight"))
    if isinstance(task.strategy, RankDyna):
        assert "training goes on at the ranks of the model" in caplog.text


def test_the_same_trainer_goes_on_with_more_epochs(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    task = make_task(tiny_bert, make())
    trainer = fit(task, tmp_path)
    ranks = read_layout(task.encoder)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(task, datamodule=SyntheticData())
    assert trainer.global_step == 6
    assert read_layout(task.encoder) == ranks


def test_the_same_task_resumes_its_own_checkpoint(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    task = make_task(tiny_bert, make())
    path = last_checkpoint(fit(task, tmp_path))
    trainer = fit(task, tmp_path, max_epochs=2, ckpt_path=path)
    assert trainer.global_step == 6
    assert kept(task) <= 0.5


def test_a_strategy_serves_another_task_from_scratch(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    strategy = make()
    first = make_task(tiny_bert, strategy)
    fit(first, tmp_path)
    second = make_task(tiny_bert, strategy)
    fit(second, tmp_path)
    assert read_layout(second.encoder) == read_layout(first.encoder)
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, first.get_parameter(name)), name
    with pytest.raises(NoTargetError, match="factorised already"):
        fit(first, tmp_path)


def test_a_model_that_is_factorised_already_is_refused(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    path = last_checkpoint(fit(make_task(tiny_bert, SVD(keep_ratio=0.5)), tmp_path))
    task = SequenceClassification.load_from_checkpoint(path, strategy=make(), weights_only=True)
    with pytest.raises(NoTargetError, match="12 layers are factorised already"):
        fit(task, tmp_path)


class Stop(pl.Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = True


def test_after_a_run_that_ended_too_early(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert, RankDyna(keep_ratio=0.4))
    trainer = make_trainer(tmp_path, max_epochs=4, callbacks=[Stop()])
    with pytest.raises(BudgetNotReachedError):
        trainer.fit(task, datamodule=SyntheticData())
    with pytest.raises(AlreadyCompactedError, match=r"ckpt_path=its last checkpoint"):
        fit(task, tmp_path, max_epochs=4)
    make_trainer(tmp_path, max_epochs=4).fit(task, datamodule=SyntheticData(), ckpt_path=last_checkpoint(trainer))
    assert kept(task) <= 0.4
    assert task.at_budget
    again = make_task(tiny_bert, task.strategy)
    fit(again, tmp_path)
    assert kept(again) <= 0.4


@pytest.mark.parametrize(
    "arguments", [{"max_epochs": 0}, {"max_steps": 0}, {"limit_train_batches": 0}], ids=["epochs", "steps", "batches"]
)
def test_a_run_without_a_step_leaves_nothing_undone(
    tiny_bert: str, tmp_path: Path, make: Make, arguments: dict[str, Any]
) -> None:
    task = make_task(tiny_bert, make())
    if task.strategy.shrinks:
        with pytest.raises(NoTrainingStepError, match="without a single optimizer step"):
            fit(task, tmp_path, **arguments)
    else:  # which has factorised before training
        fit(task, tmp_path, **arguments)
        assert kept(task) <= 0.5
    fit(task, tmp_path)  # the task is none the worse
    assert kept(task) <= 0.5


def test_another_task_in_a_trainer_that_is_done_is_not_left_unfinished(
    tiny_bert: str, tmp_path: Path, make: Make
) -> None:
    trainer, other = fit(make_task(tiny_bert, make()), tmp_path), make_task(tiny_bert, make())
    if other.strategy.shrinks:
        with pytest.raises(NoTrainingStepError, match="a new Trainer"):
            trainer.fit(other, datamodule=SyntheticData())
    else:
        trainer.fit(other, datamodule=SyntheticData())
        assert kept(other) <= 0.5


def test_fast_dev_run(tiny_bert: str, tmp_path: Path, make: Make) -> None:
    task = make_task(tiny_bert, make())
    fit(task, tmp_path, fast_dev_run=True)
    assert kept(task) <= 0.5


def test_a_plain_run_without_a_step_is_none_of_our_business(tiny_bert: str, tmp_path: Path) -> None:
    fit(make_task(tiny_bert), tmp_path, max_epochs=0)


def test_validating_a_checkpoint_tells_the_score_at_its_budget(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert, RankDyna(keep_ratio=0.4))
    stopped = make_trainer(tmp_path / "early", max_epochs=4, callbacks=[Stop()])
    with pytest.raises(BudgetNotReachedError):
        stopped.fit(make_task(tiny_bert, RankDyna(keep_ratio=0.4)), datamodule=SyntheticData())
    path = last_checkpoint(fit(task, tmp_path / "whole"))
    for strategy in (RankDyna(keep_ratio=0.4), None):
        found = make_trainer(tmp_path).validate(
            make_task(tiny_bert, strategy), SyntheticData(), ckpt_path=path, verbose=False
        )[0]
        assert found["val/score_at_budget"] == found["val/score"]
        above = make_trainer(tmp_path).validate(
            make_task(tiny_bert, strategy), SyntheticData(), ckpt_path=last_checkpoint(stopped), verbose=False
        )[0]
        assert above["val/score_at_budget"] == -torch.inf
