"""What a benchmark tells: numbers that can be checked by hand."""

from __future__ import annotations

import json

import pytest

from lowrank_pl.benchmark.figure import benchmark_figure
from lowrank_pl.benchmark.layers import LayerTimes
from lowrank_pl.benchmark.results import Measurement, Results
from lowrank_pl.benchmark.timing import Times
from lowrank_pl.core import LinearShape


def measured(model: str, seconds: float, flops: int, batch_size: int = 2, engine: str = "eager") -> Measurement:
    return Measurement(model, engine, batch_size, 10, Times((seconds, 3 * seconds, seconds)), flops, None)


RESULTS = Results(
    [
        measured("dense", 1.0, 600),
        measured("small", 0.5, 200),
        measured("dense", 4.0, 2400, 8),
        measured("small", 1.0, 800, 8),
        measured("dense", 0.5, 600, engine="compile"),
        measured("small", 0.5, 200, engine="compile"),
    ],
    {"dense": 1000, "small": 400},
    [LayerTimes(LinearShape(64, 32), 20, 2.0, {4: 1.0, 8: 3.0}), LayerTimes(LinearShape(8, 8), 20, 9.0, {4: 1.0})],
    {"threads": 1, "models": {"small": "here"}},
    {"dense": 4 << 20, "small": 3 << 19},
)


def test_speedups_compare_with_the_first_model_of_the_same_engine_and_shape() -> None:
    rows = RESULTS.rows()
    assert [row["speedup"] for row in rows] == [1, 2, 1, 4, 1, 1]
    assert [row["ideal_speedup"] for row in rows] == [1, 3, 1, 3, 1, 3]
    assert rows[1]["share_of_ideal"] == pytest.approx(2 / 3)
    assert rows[3]["texts_per_second"] == 8
    assert rows[3]["tokens_per_second"] == 80
    assert rows[0]["spread"] == 3


def test_everything_is_in_the_json() -> None:
    told = json.loads(json.dumps(RESULTS.to_dict()))
    assert told["parameters"] == {"dense": 1000, "small": 400}
    assert told["weight_bytes"] == {"dense": 4194304, "small": 1572864}
    assert len(told["models"]) == 6
    first, second = told["layers"]
    assert (first["break_even_by_parameters"], first["break_even_measured"]) == (22, 6.0)
    assert second["break_even_measured"] is None


def test_the_tables_have_a_cell_for_every_column() -> None:
    lines = [line for line in RESULTS.to_markdown().splitlines() if line.startswith("|")]
    assert "* small: 400 parameters, 1.5 MiB (here)" in RESULTS.to_markdown().splitlines()
    models, layers = lines[:8], lines[8:]
    assert {line.count("|") for line in models} == {11}
    assert {line.count("|") for line in layers} == {6}
    assert "| 64 x 32 | 20 | 2000.000 | 22 | 6 |" in layers
    assert "above 4" in layers[-1]


def test_the_picture_has_a_panel_for_every_engine_and_one_for_layers() -> None:
    eager, compiled, layers = benchmark_figure(RESULTS).axes
    assert [bar.get_height() for bar in eager.patches] == [2, 4]
    assert [bar.get_height() for bar in compiled.patches] == [1]
    assert [text.get_text() for text in layers.get_legend().get_texts()] == ["64 x 32", "8 x 8"]
    assert list(layers.lines[0].get_ydata()) == [0.5, 1.5]
    [alone] = benchmark_figure(Results(RESULTS.measurements[:1], {"dense": 1}, [], {})).axes
    assert [bar.get_height() for bar in alone.patches] == [1]
