"""A model with a factorised vocabulary, tied to its head, loads in every way: one storage, the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from lowrank_pl.checkpoint import load_model
from lowrank_pl.export import export, from_pretrained
from lowrank_pl.strategies import SVD
from lowrank_pl.surgery import TargetSelector, tied_heads
from lowrank_pl.tasks import MaskedLM
from tests.export.test_export import logits
from tests.support.runs import make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import VOCAB, save_tiny_model

WORDS, DECODER = "bert.embeddings.word_embeddings", "cls.predictions.decoder"


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A tiny language model of one layer, compressed, and where it lies."""
    where = tmp_path_factory.mktemp("vocabulary")
    strategy = SVD(keep_ratio=0.5, targets=TargetSelector(embeddings=True))
    task = MaskedLM(str(save_tiny_model("bert", where / "bert", layers=1)), strategy=strategy)
    make_trainer(where, logger=False).compress(task, SyntheticData("masked_lm", size=8), output=str(where / "out"))
    return task.eval(), str(where / "out")


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_three_ways_of_loading_agree_to_the_last_bit(compressed: tuple[Any, str], tmp_path: Path) -> None:
    task, source = compressed
    expected, size = logits(task.encoder), parameters(task.encoder)
    folder = export(source, str(tmp_path / "factorised"))
    stored = load_file(folder / "model.safetensors")
    assert [name for name in stored if DECODER in name] == []
    assert stored[f"{WORDS}.left.weight"].shape[0] == len(VOCAB)
    ours = from_pretrained(str(folder))
    remote = AutoModelForMaskedLM.from_pretrained(str(folder), trust_remote_code=True)
    ours.save_pretrained(tmp_path / "again")
    for model in (load_model(source), ours, remote, from_pretrained(str(tmp_path / "again"))):
        assert torch.equal(logits(model), expected)
        assert parameters(model) == size
        decoder: Any = model.get_submodule(DECODER)
        words: Any = model.get_submodule(WORDS)
        assert decoder.left.weight is words.left.weight
        assert decoder.right.weight is words.right.weight
    assert tied_heads(ours) == {DECODER: WORDS}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| {WORDS} | {ours.get_submodule(WORDS).rank} |" in card


def test_a_dense_folder_is_tied_as_before(compressed: tuple[Any, str], tmp_path: Path) -> None:
    task, source = compressed
    model = AutoModelForMaskedLM.from_pretrained(str(export(source, str(tmp_path / "dense"), "dense")))
    torch.testing.assert_close(logits(model), logits(task.encoder), rtol=1e-4, atol=1e-5)
    assert model.get_submodule(DECODER).weight is model.get_submodule(WORDS).weight


def test_onnx_files_keep_the_thin_matrix_also_in_eight_bits(compressed: tuple[Any, str], tmp_path: Path) -> None:
    task, source = compressed
    rank = task.encoder.get_submodule(WORDS).rank
    folder = export(source, str(tmp_path / "onnx"), "onnx", quantize="int8")  # compares the logits with torch's
    shapes = [list(tensor.dims) for tensor in onnx.load(folder / "model.onnx").graph.initializer]
    assert [len(VOCAB), rank] in shapes
    assert [len(VOCAB), 32] not in shapes
    assert [32, len(VOCAB)] not in shapes
