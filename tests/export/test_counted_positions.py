"""The cut out of a table of positions, in graphs written by hand; those of the exporter: test_onnx_families.py."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnxscript import ir

from lowrank_pl.export.counted_positions import count_positions_

TEXT = """<ir_version: 10, opset_import: ["" : 18]>
cut (int64[batch, length] ids) => (int64[row, cut] out)
<int64[1, 4] table = {TABLE}, int64[1] first = {START}, int64[1] axis = {AXIS}, int64[1] step = {STEP}>
{
    ends = Shape <start = 1, end = 2> (ids)
    out = Slice (table, first, ends, axis, step)
}"""


def model(**given: str) -> ir.Model:
    """`table[:, :length]`, or with something else in it."""
    words = {"TABLE": "{0, 1, 2, 3}", "START": "{0}", "AXIS": "{1}", "STEP": "{1}"} | given
    text = TEXT
    for name, value in words.items():
        text = text.replace("{" + name + "}", value)
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def run(made: ir.Model, length: int) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(made).SerializeToString())
    (found,) = session.run(None, {"ids": np.zeros((2, length), np.int64)})
    return np.asarray(found)


def test_positions_are_counted_and_the_same() -> None:
    made = model()
    before = [run(made, length) for length in (1, 3, 4)]
    count_positions_(made.graph)
    assert [node.op_type for node in made.graph] == ["Shape", "Squeeze", "Range", "Unsqueeze"]
    assert {"table", "first", "axis", "step"}.isdisjoint(made.graph.initializers)
    for length, expected in zip((1, 3, 4), before, strict=True):
        found = run(made, length)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert np.array_equal(found, expected)
        assert np.array_equal(found, [range(length)])


@pytest.mark.parametrize("given", [{"TABLE": "{1, 2, 3, 4}"}, {"START": "{1}"}, {"AXIS": "{0}"}, {"STEP": "{2}"}])
def test_other_cuts_are_left_alone(given: dict[str, str]) -> None:
    made = model(**given)
    count_positions_(made.graph)
    assert [node.op_type for node in made.graph] == ["Shape", "Slice"]
