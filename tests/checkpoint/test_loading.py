"""Whole models by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank_pl.checkpoint import load_model
from lowrank_pl.errors.checkpoint import NotACheckpointError
from lowrank_pl.errors.pretrained import ModelFolderError
from lowrank_pl.export import export
from tests.export.test_export import checkpoint, logits
from tests.support.forks import Forks

FILES = Path(__file__).parents[1] / "fixtures" / "v1"

LOADED = """
import sys
import lowrank_pl
model = lowrank_pl.from_pretrained(sys.argv[1])
print(type(model).__name__, sorted({name for name in sys.modules if name in (
    "lightning", "pytorch_lightning", "torchmetrics", "datasets", "matplotlib",
    "lowrank_pl.tasks", "lowrank_pl.strategies", "lowrank_pl.data", "lowrank_pl.export", "lowrank_pl.checkpoint",
)}))
"""


def test_from_pretrained_loads_a_model_without_lightning_and_without_the_rooms_that_train(
    transformers_loaded: Forks, tmp_path: Path
) -> None:
    said = transformers_loaded.run(["-c", LOADED, str(FILES / "exported")], tmp_path)
    assert said.splitlines()[-1] == "LowRankBertForSequenceClassification ['lowrank_pl.checkpoint']"


def test_a_checkpoint_and_its_exports_are_the_same_model(tiny_bert: str, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    task = checkpoint(tiny_bert, path)
    expected = logits(task.encoder)
    factored, dense = tmp_path / "factored", tmp_path / "dense"
    export(str(path), str(factored))
    export(str(path), str(dense), format="dense")
    for place in (path, factored, tmp_path):  # a folder that holds model.ckpt is what compress writes
        model = load_model(str(place))
        assert not model.training
        assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(load_model(str(dense))), expected)


def test_a_pre_trained_folder_loads_as_the_class_that_it_names(tiny_bert: str) -> None:
    assert type(load_model(tiny_bert)).__name__ == "BertForMaskedLM"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("no checkpoint", encoding="utf-8")
    with pytest.raises(NotACheckpointError):
        load_model(str(tmp_path / "text.ckpt"))
    with pytest.raises(ModelFolderError):
        load_model(str(tmp_path))
