"""Every encoder family through fit, factorisation, checkpoint and reload, in every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lowrank_pl.contract import TargetKind
from lowrank_pl.strategies import FWSVD
from lowrank_pl.surgery import read_layout
from lowrank_pl.tasks import Distillation, EncoderTask, MaskedLM, SequenceClassification, TokenClassification
from tests.support.runs import last_checkpoint, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import FAMILIES, save_tiny_model

TASKS: dict[TargetKind, type[EncoderTask]] = {
    "classification": SequenceClassification,
    "regression": SequenceClassification,
    "token_classification": TokenClassification,
    "masked_lm": MaskedLM,
}
ALL_FAMILIES: list[tuple[str, TargetKind]] = [(family, "classification") for family in FAMILIES]
ALL_TASKS: list[tuple[str, TargetKind]] = [("bert", kind) for kind in list(TASKS)[1:]]
OTHERS: list[tuple[str, TargetKind]] = [("deberta-v2", "token_classification"), ("mobilebert", "masked_lm")]


@pytest.mark.parametrize(("family", "kind"), ALL_FAMILIES + ALL_TASKS + OTHERS)
def test_fit_save_load(family: str, kind: TargetKind, tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    pretrained, data = str(save_tiny_model(family, tmp_path / "model")), SyntheticData(kind, size=16)
    task = TASKS[kind](pretrained, strategy=FWSVD("both", keep_ratio=0.5))
    trainer = make_trainer(tmp_path)
    trainer.fit(task, datamodule=data)
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    assert f"val/{data.target.metrics[0]}" in trainer.callback_metrics
    assert len(read_layout(task.encoder).modules) > 4
    loaded: Any = TASKS[kind].load_from_checkpoint(last_checkpoint(trainer))
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(loaded.eval()(batch), task.eval()(batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_has_a_hidden_state_per_block(family: str, tmp_path: Path) -> None:
    """No fit: a model that learns from itself, without dropout, has nothing to learn."""
    batch = next(iter(SyntheticData("masked_lm").val_dataloader()))
    task = MaskedLM(str(save_tiny_model(family, tmp_path / "model")), distillation=Distillation(labels=0))
    task.build(SyntheticData("masked_lm").target)
    task.take_teacher()
    task.eval()
    assert abs(task.training_step(batch, 0).item()) < 1e-6
    assert task._teacher is not None
    assert len(task._teacher(batch, hidden_states=True)[1]) == 2


@pytest.mark.parametrize("kind", list(TASKS))
def test_training_loss_of_one_sample_is_its_own_loss(kind: TargetKind, tiny_bert: str) -> None:
    data = SyntheticData(kind)
    task = TASKS[kind](tiny_bert)
    task.build(data.target)
    task.eval()
    single = SyntheticData(kind, batch_size=1)
    batches = [batch for batch, _ in zip(single.val_dataloader(), range(4), strict=False)]
    alone = torch.stack([task.training_loss(task(batch), batch["labels"]) for batch in batches])
    together = next(iter(SyntheticData(kind, batch_size=4).val_dataloader()))
    torch.testing.assert_close(task.per_sample_losses(together), alone, atol=1e-5, rtol=1e-5)
