"""The class that makes a model lies beside its weights; older files tell it by what they predict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForMultipleChoice, BertForMultipleChoice

from lowrank_pl.checkpoint import build, describe, from_checkpoint, name_in_transformers
from lowrank_pl.contract import TargetKind, TargetSpec
from lowrank_pl.errors.checkpoint import CheckpointMismatchError, NotACheckpointError
from lowrank_pl.surgery import read_layout
from lowrank_pl.tasks import EncoderTask, MaskedLM, SequenceClassification, TokenClassification
from tests.surgery.encoders import tiny_model


def stored(kind: TargetKind = "classification", auto_class: str | None = None, model: Any = None) -> dict[str, Any]:
    """A checkpoint as a task writes it, of today or, without an Auto class, of earlier."""
    model = model or tiny_model("bert")
    told = describe(model.config, read_layout(model), TargetSpec("x", kind, ("no", "yes")), None, None, auto_class)
    return {"state_dict": {f"encoder.{name}": tensor for name, tensor in model.state_dict().items()}, **told}


def test_a_model_is_made_by_the_class_that_its_file_tells_whatever_it_predicts() -> None:
    config: Any = tiny_model("bert").config
    model = BertForMultipleChoice(config)
    built = build(from_checkpoint(stored(auto_class="AutoModelForMultipleChoice", model=model), "x.ckpt"))
    assert type(built) is BertForMultipleChoice
    assert not built.training
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in built.state_dict().items())


@pytest.mark.parametrize("task", [SequenceClassification, TokenClassification, MaskedLM])
def test_a_file_of_before_tells_it_by_what_it_predicts(task: type[EncoderTask]) -> None:
    for kind in task.kinds:
        checkpoint = stored(kind)
        assert from_checkpoint(checkpoint, "x.ckpt").auto_class == task.auto_class.__name__
        del checkpoint["lowrank_task"]["auto_class"]
        assert from_checkpoint(checkpoint, "x.ckpt").auto_class == task.auto_class.__name__


@pytest.mark.parametrize("name", ["AutoModelForNothing", "BertModel", "pipeline"])
def test_a_name_that_is_no_auto_class_is_refused(name: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=f"has no Auto class '{name}'"):
        build(from_checkpoint(stored(auto_class=name), "x.ckpt"))


def test_a_file_that_tells_no_class_is_refused_unless_one_is_given() -> None:
    saved = replace(from_checkpoint(stored(), "x.ckpt"), auto_class=None)
    with pytest.raises(NotACheckpointError, match="which class of transformers"):
        build(saved)
    with pytest.raises(CheckpointMismatchError):  # it has another head
        build(saved, AutoModelForMaskedLM)


def test_only_names_that_transformers_knows_are_written() -> None:
    class AutoModelForMine(AutoModelForMaskedLM):
        """Of somebody else."""

    assert name_in_transformers(AutoModelForMultipleChoice) == "AutoModelForMultipleChoice"
    assert name_in_transformers(AutoModelForMine) is None
    assert name_in_transformers(BertForMultipleChoice) is None
