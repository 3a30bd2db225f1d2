"""Indicators in cases whose answer is known."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.core.diagnosis import BOTH, ELEMENTWISE, INPUT, OUTPUT, SVD, diagnose
from lowrank_pl.errors.numerics import ImportanceError, RankError


def weight() -> torch.Tensor:
    return torch.randn(20, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def spread(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(size, generator=generator, dtype=torch.float64)).exp()


def test_constant_importance_needs_no_more_than_svd() -> None:
    found = diagnose(weight(), torch.full((20, 14), 3.0), 4)
    assert found.variance == found.relative_variance == found.within_input == 0
    assert found.rank_one_residual == pytest.approx(0, abs=1e-12)
    assert found.recommendation == SVD
    assert found.gain == 0


def test_importance_of_inputs_is_seen_by_the_input_side() -> None:
    found = diagnose(weight(), spread(14, 1)[None].expand(20, 14).contiguous(), 4)
    assert found.within_input == pytest.approx(0)
    assert found.relative_variance > 1
    assert found.recommendation == INPUT
    assert 0 < found.gain < 1


def test_importance_of_outputs_is_not() -> None:
    found = diagnose(weight(), spread(20, 1)[:, None].expand(20, 14).contiguous(), 4)
    assert found.within_input == pytest.approx(found.relative_variance)
    assert found.recommendation == OUTPUT


def test_rank_one_importance_is_seen_from_both_sides() -> None:
    found = diagnose(weight(), torch.outer(spread(20, 1), spread(14, 2)), 4)
    assert found.rank_one_residual == pytest.approx(0, abs=1e-12)
    assert found.recommendation == BOTH


def test_unstructured_importance_needs_every_element() -> None:
    importance = spread(20 * 14, 3).view(20, 14)
    found = diagnose(weight(), importance, 4)
    assert found.rank_one_residual > 0.5
    assert found.recommendation == ELEMENTWISE
    values = list(found.objective.values())
    assert found.objective[ELEMENTWISE] == min(values)
    total = float((importance * weight().square()).sum())
    for method, value in found.objective.items():
        assert found.expected_rise[method] == pytest.approx(value * total / 2)


def test_scale_free_indicators_do_not_depend_on_the_scale() -> None:
    importance = spread(20 * 14, 3).view(20, 14)
    one, other = diagnose(weight(), importance, 4), diagnose(weight(), importance * 1e-9, 4)
    assert other.relative_variance == pytest.approx(one.relative_variance)
    assert other.within_input == pytest.approx(one.within_input)
    assert other.rank_one_residual == pytest.approx(one.rank_one_residual)
    assert other.variance == pytest.approx(one.variance * 1e-18)


def test_all_zero_importance() -> None:
    found = diagnose(weight(), torch.zeros(20, 14), 4)
    assert found.recommendation == SVD
    assert found.rank_one_residual == 0


def test_bad_input() -> None:
    with pytest.raises(RankError):
        diagnose(weight(), torch.ones(20, 14), 15)
    with pytest.raises(ImportanceError):
        diagnose(weight(), -torch.ones(20, 14), 4)
