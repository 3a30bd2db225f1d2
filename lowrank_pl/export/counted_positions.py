"""Positions in an ONNX graph: counted up to the length of the texts, instead of cut out of a table of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    from onnxscript import ir


def count_positions_(graph: ir.Graph) -> None:
    """Replaces `table[:, :length]`, where the table holds 0, 1, 2, …, by `range(length)`.

    Encoders with absolute positions keep such a table. Of its cut a tool that infers shapes knows no more than that it
    is not longer than the table, and so cannot tell that it is as long as the texts: onnxruntime's own preprocessing
    before quantisation stops there ("Incomplete symbolic shape inference"). The numbers are the same; of a text that is
    longer than the table the look-up fails instead of the sum after it.

    Args:
        graph: Of the exporter; constants are initializers.
    """
    from onnxscript import ir

    for node in list(graph):
        if not _cuts_positions(node):
            continue
        cut, ends = list(node.inputs), node.inputs[2]
        zero, one = (_constant(graph, f"{node.name}_{number}", np.array(number, np.int64)) for number in (0, 1))
        axis = _constant(graph, f"{node.name}_axis", np.array([0], np.int64))
        limit = ir.node("Squeeze", [ends])
        count = ir.node("Range", [zero, limit.outputs[0], one])
        row = ir.node("Unsqueeze", [count.outputs[0], axis])
        made = [limit, count, row]
        ir.convenience.replace_nodes_and_values(graph, node, [node], made, list(node.outputs), list(row.outputs))
        for value in cut:  # of what nothing uses, onnxruntime warns whoever loads the file
            if value is not None and not value.uses():
                graph.initializers.pop(str(value.name), None)


def _cuts_positions(node: ir.Node) -> bool:
    """Whether a node takes the first columns of `[[0, 1, 2, …]]`, as many as another one tells."""
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return False
    table, starts, ends, axes, *steps = node.inputs
    if table is None or table.const_value is None or ends is None or ends.const_value is not None:
        return False
    columns = table.const_value.numpy().shape[-1:]
    cut = _holds(starts, [0]) and _holds(axes, [1]) and all(_holds(step, [1]) for step in steps)
    return cut and _holds(table, np.arange(*columns)[None])


def _holds(value: ir.Value | None, numbers: npt.ArrayLike) -> bool:
    """Whether a constant holds these whole numbers."""
    found = None if value is None or value.const_value is None else value.const_value.numpy()
    return found is not None and found.dtype == np.int64 and np.array_equal(found, numbers)


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    from onnxscript import ir

    made = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(made)
    return made
