"""Layers over their ranks: where the factors stop being faster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank_pl.allocation import Latency
from lowrank_pl.benchmark.layers import (
    LayerTimes,
    Workload,
    latency_table,
    linear_shapes,
    measure_layer,
    number_of_measurements,
    ranks_to_measure,
)
from lowrank_pl.checkpoint import load_model
from lowrank_pl.core import LinearShape
from lowrank_pl.nn import LowRankLinear, PivotedLinear
from lowrank_pl.surgery import TargetSelector, replace_module_

SHAPE = LinearShape(64, 32)
WORK = Workload(tokens=8, dtype=torch.float32, device="cpu", threads=1, rounds=2, seconds=1e-4)


@pytest.mark.parametrize(
    ("dense", "expected"),
    [
        (2.0, 8.0),  # as slow as dense at a measured rank
        (3.0, 12.0),  # half way between two
        (0.5, 0.0),  # never faster
        (1.0, 0.0),
        (9.0, None),  # faster at every measured rank
    ],
)
def test_break_even_is_where_the_lines_cross(dense: float, expected: float | None) -> None:
    times = LayerTimes(SHAPE, 8, dense, {4: 1.0, 8: 2.0, 16: 4.0})
    assert times.break_even == expected


def test_the_first_crossing_counts() -> None:
    """A later rank that happens to be fast again is no promise for those between."""
    assert LayerTimes(SHAPE, 8, 3.0, {4: 1.0, 8: 5.0, 12: 2.0}).break_even == 6.0


@pytest.mark.parametrize("shape", [LinearShape(384, 1536), LinearShape(768, 768), SHAPE, LinearShape(2, 3)])
def test_ranks_reach_beyond_break_even_where_there_are_any(shape: LinearShape) -> None:
    ranks = ranks_to_measure(shape)
    assert ranks == sorted(set(ranks))
    assert (ranks[0], ranks[-1]) == (1, shape.full_rank)
    assert any(shape.break_even_rank <= rank <= 1.4 * shape.break_even_rank + 1 for rank in ranks)
    if shape.full_rank > 100:
        assert all(rank % 8 == 0 for rank in ranks[1:])


def test_layers_are_timed_in_the_form_that_is_asked_for(tmp_path: Path) -> None:
    assert ranks_to_measure(LinearShape(384, 1536), "pivoted")[-3:] == [
        304,
        344,
        384,
    ]  # no break-even but the full rank
    work, calls = replace(WORK, form="pivoted"), []
    found = measure_layer(LinearShape(8, 6), work, lambda: calls.append(1))
    assert (found.form, found.break_even_by_parameters) == ("pivoted", 6)
    assert len(calls) == number_of_measurements([found.shape], work.rounds, "pivoted")
    (tmp_path / "latency.json").write_text(json.dumps(latency_table([found], work)))
    assert Latency(str(tmp_path / "latency.json")).form is PivotedLinear


def test_measured_times_make_a_table_that_latency_reads(tmp_path: Path) -> None:
    shapes = [SHAPE, LinearShape(32, 32)]
    steps: list[int] = []
    times = [measure_layer(shape, WORK, lambda: steps.append(1)) for shape in shapes]
    assert len(steps) == number_of_measurements(shapes, WORK.rounds)
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(latency_table(times, WORK)), encoding="utf-8")
    latency = Latency(str(path))
    for found in times:
        assert LayerTimes.from_entry({**found.entry(), "tokens": found.tokens}) == found
        assert latency.dense(found.shape) == pytest.approx(found.dense * 1e9, abs=1)
        ranks = list(found.factored)
        costs = [latency.factored(found.shape, rank) for rank in ranks]
        assert costs == sorted(costs)
        assert costs[0] == pytest.approx(found.factored[ranks[0]] * 1e9, abs=1)
    told = json.loads(path.read_text(encoding="utf-8"))
    assert (told["tokens"], told["dtype"], told["device"], told["threads"]) == (8, "float32", "cpu", 1)


def test_shapes_are_those_of_the_targets(tiny_bert: str) -> None:
    model = load_model(tiny_bert)
    assert linear_shapes(model, TargetSelector()) == [LinearShape(32, 32), LinearShape(64, 32), LinearShape(32, 64)]
    assert linear_shapes(torch.nn.Linear(2, 2), TargetSelector()) == []


def test_shapes_of_layers_that_stayed_dense_are_there_too(tiny_bert: str, tmp_path: Path) -> None:
    """A table without them could not pay for the model that it was measured on."""
    model = load_model(tiny_bert)
    name, linear = next((n, m) for n, m in TargetSelector().select(model).items() if m.out_features == 64)
    replace_module_(model, name, LowRankLinear.like(linear, 3))
    shapes = linear_shapes(model, TargetSelector())
    assert set(shapes) == {LinearShape(32, 32), LinearShape(64, 32), LinearShape(32, 64)}
