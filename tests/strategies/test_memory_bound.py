"""Bytes by part, by hand."""

from __future__ import annotations

from lowrank_pl.core import LinearShape, decomposing_bytes
from lowrank_pl.importance import SecondMoments
from lowrank_pl.strategies.memory_bound import fitting_bytes, memory_bound

SHAPES = {f"layers.{block}.{name}": LinearShape(2, 4) for block in (0, 1) for name in ("a", "b")}
KEPT = dict.fromkeys(SHAPES, 6)


def test_every_part_is_what_it_is_by_hand() -> None:
    groups = [["layers.0.a", "layers.0.b", "layers.1.a"], ["layers.1.b"]]
    found = memory_bound(SHAPES, KEPT, 100, 2, SecondMoments(), groups, 60)
    assert fitting_bytes(LinearShape(2, 4)) == 8 * (7 * 16 + 4 * 8 + 2 * 4) == 1216
    assert (found.weights, found.factors, found.fitting, found.kept_calls) == (200, 2 * 6 * 2, 1216, 120)
    assert found.measuring == 3 * 8 * (16 + 4)
    assert found.staying == 2 * 6 * 2, "of the other block"
    assert found.disk == 4 * 4 * 4 + 2 * 24
    assert found.peak == 200 + 24 + 1216 + 120
    assert decomposing_bytes(LinearShape(2, 4)) == 8 * (16 + 4 * 4 + 6 * 8) == 640
    every = memory_bound(SHAPES, KEPT, 100, 2, SecondMoments(), [list(SHAPES) * 4], 60)
    assert every.peak == 200 + every.measuring + 640, "many sums at once, and one layer decomposed"
    assert memory_bound(SHAPES, KEPT, 100, 2, None, [], 60, stays=True).peak == 200 + 48 + 1216 + 120


def test_nothing_is_measured_beforehand_without_gradients_and_energies() -> None:
    found = memory_bound(SHAPES, KEPT, 100, 4, None, [], 0)
    assert (found.measuring, found.disk) == (0, 4 * 24)


def test_the_text_names_every_part() -> None:
    lines = memory_bound(SHAPES, KEPT, 2**30, 4, None, [], 2**30).lines("3 samples")
    assert lines[0] == "memory block by block: at most 8.00 GiB, beside the activations of one batch"
    assert lines[1] == "  weights: 4.00 GiB"
    assert lines[6] == "  kept calls of one block (3 samples): 4.00 GiB"
