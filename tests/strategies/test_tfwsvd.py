"""The element-wise method inside a run: what it minimises, what it tells, what it refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_pl.core.elementwise import Adam, ElementwiseSolver, WeightedProblem, shrink_importance, weighted_low_rank
from lowrank_pl.core.elementwise.solver import Iterate
from lowrank_pl.errors.numerics import ImportanceError, NonFiniteError, RangeError
from lowrank_pl.importance import Fisher, LayerFisher, empirical_fisher
from lowrank_pl.nn import LowRankLinear, dense_weight
from lowrank_pl.strategies import TFWSVD, Calibration
from lowrank_pl.strategies.calibration import measure_importance
from lowrank_pl.surgery import TargetSelector
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import SyntheticData

LAYER = "bert.encoder.layer.1.intermediate.dense"


def compress(pretrained: str, folder: Path, strategy: TFWSVD) -> Any:
    task = make_task(pretrained, strategy)
    make_trainer(folder).compress(task, SyntheticData(), output=str(folder / "out"))
    return task


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, None])
def test_writes_the_solution_for_the_fisher_information_after_shrinkage(
    tiny_bert: str, tmp_path: Path, shrinkage: float | None
) -> None:
    dense = make_task(tiny_bert)
    dense.build(SyntheticData().target)
    layers = TargetSelector().select(dense.encoder)
    fisher = empirical_fisher(
        dense.encoder, layers, SyntheticData().calibration_batches(8), dense.per_sample_losses
    ).layers[LAYER]
    assert fisher.full is not None
    share = 64 / (64 + 48) if shrinkage is None else shrinkage  # 48 training samples
    importance = shrink_importance(fisher.full, share)
    expected = weighted_low_rank(dense_weight(layers[LAYER]).detach(), importance, 5)
    task = compress(tiny_bert, tmp_path, TFWSVD(rank_ratio=0.16, shrinkage=shrinkage))
    found = task.encoder.get_submodule(LAYER)
    assert isinstance(found, LowRankLinear)
    assert found.rank == 5
    torch.testing.assert_close(found.product(), expected.factors.product(), rtol=0, atol=1e-5)
    record = next(layer for layer in task.compression.layers if layer.name == LAYER)
    assert record.losses == pytest.approx(expected.losses, rel=1e-3)
    assert record.weighted_error == pytest.approx(math.sqrt(expected.loss), rel=1e-3)
    assert record.outcome == expected.reason


@pytest.mark.parametrize(
    ("poison", "error", "message"),
    [
        (-1.0, ImportanceError, rf"layer '{LAYER}' has the negative entry -1.0 at \(3, 2\)"),
        (math.nan, NonFiniteError, f"layer '{LAYER}' contains 1 NaN or Inf"),
        (math.inf, NonFiniteError, f"layer '{LAYER}' contains 1 NaN or Inf"),
    ],
)
def test_bad_importance_is_refused_with_layer_and_entry(
    tiny_bert: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    poison: float,
    error: type[Exception],
    message: str,
) -> None:
    measure = measure_importance

    def poisoned(*args: Any, **kwargs: Any) -> Fisher:
        fisher = measure(*args, **kwargs)
        full = fisher.layers[LAYER].full
        assert full is not None
        full = full.clone()
        full[3, 2] = poison
        return replace(fisher, layers={**fisher.layers, LAYER: replace(fisher.layers[LAYER], full=full)})

    monkeypatch.setattr("lowrank_pl.strategies.layer_factoriser.measure_importance", poisoned)
    with pytest.raises(error, match=message):
        compress(tiny_bert, tmp_path, TFWSVD(keep_ratio=0.5))


def test_zero_importance_falls_back_to_svd_and_is_told(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = measure_importance

    def emptied(*args: Any, **kwargs: Any) -> Fisher:
        fisher = measure(*args, **kwargs)
        zero = LayerFisher(*(torch.zeros_like(t) for t in vars(fisher.layers[LAYER]).values()))
        return replace(fisher, layers={**fisher.layers, LAYER: zero})

    monkeypatch.setattr("lowrank_pl.strategies.layer_factoriser.measure_importance", emptied)
    task = compress(tiny_bert, tmp_path, TFWSVD(keep_ratio=0.5))
    (note,) = task.compression.notes
    assert LAYER in note
    assert "plain SVD" in note
    record = next(layer for layer in task.compression.layers if layer.name == LAYER)
    assert record.error == pytest.approx(record.weighted_error, rel=1e-5)


class Diverging(ElementwiseSolver):
    """One good step, then away."""

    def __init__(self) -> None:
        super().__init__(max_steps=10, tolerance=0.0)

    def iterate(self, problem: WeightedProblem, a: Tensor, b: Tensor) -> Iterator[Iterate]:
        first = next(Adam(300).iterate(problem, a, b))
        yield first
        for power in itertools.count(1):
            yield a * 10.0**power, b, problem.loss(a * 10.0**power, b)


def test_a_diverging_solver_keeps_its_best_and_is_told(tiny_bert: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Diverging diverged at step"):
        task = compress(tiny_bert, tmp_path, TFWSVD(Diverging(), keep_ratio=0.5))
    assert len(task.compression.notes) == 12
    assert f"the solver of '{task.compression.layers[0].name}' diverged at step" in task.compression.notes[0]
    for layer in task.compression.layers:
        assert layer.weighted_error**2 <= layer.losses[0] * (1 + 1e-6)


def test_bad_shrinkage_is_refused_at_once() -> None:
    with pytest.raises(RangeError, match=r"shrinkage=1\.5"):
        TFWSVD(keep_ratio=0.5, shrinkage=1.5)


def test_the_report_names_solver_and_samples(tiny_bert: str, tmp_path: Path) -> None:
    task = compress(tiny_bert, tmp_path, TFWSVD(Adam(7), keep_ratio=0.5, calibration=Calibration(max_samples=16)))
    options = task.compression.options
    assert options["solver"]["class"] == "Adam"
    assert options["solver"]["max_steps"] == 7
    assert options["calibration_samples"] == 16
    assert all(len(layer.losses) == 8 for layer in task.compression.layers)
