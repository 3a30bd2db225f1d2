"""The default optimizer."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import Optimizer

from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.importance import FirstOrder, KroneckerSensitivity
from lowrank_pl.strategies import FWSVD, RankDyna
from lowrank_pl.tasks import SequenceClassification, optimization
from lowrank_pl.tasks.optimization import default_optimizer
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData


def test_a_task_can_be_pickled_with_all_its_defaults() -> None:
    task = pickle.loads(pickle.dumps(SequenceClassification("somewhere", strategy=FWSVD(keep_ratio=0.5))))
    assert task.pretrained == "somewhere"
    assert task._make_optimizer is default_optimizer


def test_the_default_is_the_one_that_the_signature_shows() -> None:
    shown = inspect.signature(SequenceClassification).parameters["optimizer"].default
    parameters = [nn.Parameter(torch.zeros(2))]
    assert default_optimizer(parameters).defaults == shown(parameters).defaults
    assert type(default_optimizer(parameters)) is type(shown(parameters))


def test_trying_an_optimizer_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    optimization.try_optimizer(lambda groups: torch.optim.AdamW(groups, lr=1e-3))
    assert torch.equal(torch.get_rng_state(), before)


class Float16(MixedPrecision):
    """Mixed precision with a scaler, on the CPU."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.mark.parametrize("score", [KroneckerSensitivity, FirstOrder])
def test_fused_steps_are_clipped_and_observed_without_the_scale_of_the_loss(
    tiny_bert: str, tmp_path: Path, score: Any
) -> None:
    norms, seen = [], []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()])))

    def fused(params: Any) -> Optimizer:
        return torch.optim.AdamW(params, lr=1e-3, fused=True)

    for plugins in ([], [Float16()]):
        task = make_task(tiny_bert, RankDyna(keep_ratio=0.4, sensitivity=score()), optimizer=fused)
        trainer = make_trainer(tmp_path, gradient_clip_val=1.0, plugins=plugins, callbacks=[Look()])
        trainer.fit(task, datamodule=SyntheticData())
        assert task.strategy.at_budget
        seen.append(sum(float(score.sum()) for score in task.strategy.latest_scores.values()))
    assert norms[6] == pytest.approx(norms[0], rel=0.1)  # the first steps of both runs
    assert seen[1] == pytest.approx(seen[0], rel=0.5)


@pytest.mark.parametrize("monitor", ["val/loss", "val/score_at_budget"])
def test_rates_fall_where_a_score_no_longer_improves(tiny_bert: str, tmp_path: Path, monitor: str) -> None:
    def scheduler(optimizer: Optimizer) -> ReduceLROnPlateau:
        # No epoch is as much better as that, but for the first one.
        return ReduceLROnPlateau(optimizer, monitor, patience=0, threshold=1e9, threshold_mode="abs")

    task = make_task(tiny_bert, RankDyna(keep_ratio=0.4), scheduler=scheduler)
    trainer = make_trainer(tmp_path, max_epochs=3)
    trainer.fit(task, datamodule=SyntheticData())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.1**2)


def test_a_rate_that_has_fallen_is_no_other_setting(
    tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(epochs: int, resume: str | None = None) -> Any:
        task = make_task(tiny_bert, scheduler=lambda o: ReduceLROnPlateau(o, "val/loss", patience=0, threshold=9.0))
        trainer = make_trainer(tmp_path, max_epochs=epochs)
        trainer.fit(task, datamodule=SyntheticData(), ckpt_path=resume)
        return trainer

    trainer = fit(3, last_checkpoint(fit(2)))
    assert trainer.optimizers[0].param_groups[0]["lr"] < 1e-2
    assert trainer.lightning_module.lr == 1e-2
    assert "is ignored" not in caplog.text


def test_a_plateau_of_nothing_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    task = make_task(tiny_bert, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(MissingArgumentError, match="monitor"):
        make_trainer(tmp_path).fit(task, datamodule=SyntheticData())
