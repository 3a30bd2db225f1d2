"""The picture of a benchmark can be read, with long names and many shapes."""

from __future__ import annotations

import pytest

from lowrank_pl.benchmark.figure import benchmark_figure
from lowrank_pl.benchmark.layers import LayerTimes
from lowrank_pl.benchmark.results import Measurement, Results
from lowrank_pl.benchmark.timing import Times
from lowrank_pl.core import LinearShape
from tests.support.pictures import faults

MODELS = [f"logs/runs/tuned-at-keep-ratio-0.{digit}/checkpoints/best.ckpt" for digit in (9, 7, 5, 3)]
CELLS = [(batch, length) for batch in (1, 8, 32) for length in (16, 64, 128)]


@pytest.mark.parametrize("models", [2, 4])
@pytest.mark.parametrize("cells", [1, 9])
def test_nothing_is_cut_off_or_covered(models: int, cells: int) -> None:
    measurements = [
        Measurement(name, engine, *cell, Times((1 / (1 + index),)), 600 // (1 + index), None)
        for engine in ("eager", "onnxruntime")
        for cell in CELLS[:cells]
        for index, name in enumerate(MODELS[:models])
    ]
    layers = [LayerTimes(LinearShape(*size), 4096, 1.0, {8: 0.1, 384: 2.0}) for size in ((768, 768), (3072, 768))]
    assert faults(benchmark_figure(Results(measurements, {}, layers, {}))) == []
