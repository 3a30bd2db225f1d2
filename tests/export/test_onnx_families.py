"""Every family as an ONNX file, in float32 and in eight bits: what torch computes, at every shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from lowrank_pl.export import export
from lowrank_pl.export.onnx_file import model_inputs
from lowrank_pl.hub import longest_input
from tests.export.test_export import checkpoint
from tests.export.test_onnx_file import onnx_logits, same_logits, torch_logits
from tests.support.tiny import FAMILIES, save_tiny_model

pytestmark = pytest.mark.usefixtures("onnx_once")  # in eight bits from the same file
Models = Callable[[str], tuple[Any, str]]

# Every family once, every kind of task at least once.
CASES = {
    "bert": "classification",
    "roberta": "classification",
    "distilbert": "masked_lm",
    "albert": "classification",
    "electra": "regression",
    "deberta-v2": "token_classification",
    "mpnet": "classification",
    "modernbert": "classification",
    "mobilebert": "classification",
}
TYPED = {"bert", "roberta", "albert", "electra", "mobilebert"}  # more than one token type in tests.support.tiny
# What the position embeddings reach; RoBERTa counts from behind its padding index 0, MPNet always from behind 1.
LONGEST = {name: {"roberta": 127, "mpnet": 126}.get(name, 128) for name in FAMILIES}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The encoder of a family and its checkpoint: one layer, as further ones are the same; made once."""
    found: dict[str, tuple[Any, str]] = {}

    def model(family: str) -> tuple[Any, str]:
        if family not in found:
            folder = tmp_path_factory.mktemp(family)
            pretrained = str(save_tiny_model(family, folder / "pretrained", layers=1))
            task = checkpoint(pretrained, folder / "model.ckpt", CASES[family])
            found[family] = task.encoder, str(folder / "model.ckpt")
        return found[family]

    return model


def axes(value: Any) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_computes_the_same_at_every_shape(
    models: Models, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where shape inference fails it writes the model into the present folder
    encoder, source = models(family)
    before = encoder.config._attn_implementation
    where = export(source, str(tmp_path / "out"), format="onnx")

    longest = LONGEST[family]
    assert longest_input(encoder) == longest
    same_logits(where, encoder, [(1, 1), (1, 2), (2, 1), (4, 17), (2, longest - 1), (1, longest)])

    written = onnx.load(str(where / "model.onnx"))
    graph = written.graph
    # onnxruntime warns whoever loads the file of each that is left over.
    assert {one.name for one in graph.initializer} <= {name for node in graph.node for name in node.input}
    SymbolicShapeInference.infer_shapes(written, auto_merge=False)  # as onnxruntime's quant_pre_process calls it
    inputs = {value.name: axes(value) for value in graph.input}
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if family in TYPED else [])]
    assert inputs == {name: ["batch", "length"] for name in names}
    (output,) = graph.output
    assert output.name == "logits"
    # Of torch's fused attention and its GELU, what takes several passes over all numbers.
    assert {node.op_type for node in graph.node}.isdisjoint({"IsNaN", "Erf"})
    assert encoder.config._attn_implementation == before
    assert axes(output)[0] == "batch"

    told = json.loads((where / "report.json").read_text())["onnx"]
    assert told["inputs"] == names
    assert told["opset"] == 20
    assert told["onnxruntime"] == onnxruntime.__version__
    assert told["shapes"] == [[1, 1], [2, 5], [3, 33], [1, longest]]
    assert 0 <= told["max_abs_difference"] < 1e-6


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert"])
def test_logits_in_eight_bits_are_close_and_the_distance_is_told(models: Models, tmp_path: Path, family: str) -> None:
    encoder, source = models(family)
    where = export(source, str(tmp_path / "out"), format="onnx", quantize="int8")
    report = json.loads((where / "report.json").read_text())["onnx"]
    told = report["int8"]
    assert report["max_abs_difference"] < 1e-6  # of the file in float32, from which this one is made
    assert sorted(path.name for path in where.glob("*.onnx*")) == ["model.onnx"]
    assert told["bytes"][1] == (where / "model.onnx").stat().st_size < told["bytes"][0]
    pairs = []
    for batch, length in ((1, 1), (2, 5), (3, 33), (1, LONGEST[family])):
        inputs = model_inputs(encoder, batch, length)
        pairs.append((onnx_logits(where, inputs), torch_logits(encoder, inputs)))
    found, expected = (torch.cat([part.flatten(0, -2) for part in side]) for side in zip(*pairs, strict=True))
    difference = float((found - expected).norm() / expected.norm())
    assert told["relative_difference"] == pytest.approx(difference, rel=1e-3)
    assert 0 < difference < 0.2
    assert told["agreement"] == pytest.approx(float((found.argmax(1) == expected.argmax(1)).float().mean()))
    assert (
        list(onnx.load(str(where / "model.onnx")).graph.value_info) == []
    )  # onnxruntime would slow itself down by them
    card = (where / "README.md").read_text()
    assert f"logits are {difference:.1%} of their size away from float32" in card
    assert "apart in float32" in card
