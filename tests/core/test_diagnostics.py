import pytest
import torch

from lowrank_pl.core import relative_error, singular_values, truncated_svd
from tests.core.matrices import random_importance, random_matrix


def test_perfect_is_zero_and_nothing_is_one() -> None:
    weight = random_matrix(4, 3)
    assert relative_error(weight, weight) == 0.0
    assert relative_error(weight, torch.zeros(4, 3)) == pytest.approx(1.0)
    importances = random_importance(3), random_importance(4)
    assert relative_error(weight, torch.zeros(4, 3), *importances) == pytest.approx(1.0)


def test_zero_weight_has_error_zero() -> None:
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0


def test_weight_without_importance_has_error_zero() -> None:
    assert relative_error(torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2)) == 0.0


def test_svd_error_is_the_tail_of_the_spectrum() -> None:
    weight = random_matrix(6, 5, dtype=torch.float64)
    sigma = singular_values(weight)
    expected = float((sigma[2:] ** 2).sum().sqrt() / (sigma**2).sum().sqrt())
    assert relative_error(weight, truncated_svd(weight, 2).product()) == pytest.approx(expected)


def test_weighted_error_equals_the_sum_over_entries() -> None:
    weight, other = random_matrix(4, 3), random_matrix(4, 3, seed=5)
    b, a = random_importance(3), random_importance(4, seed=2)
    above = sum(float(a[i] * b[j] * (weight - other)[i, j] ** 2) for i in range(4) for j in range(3))
    below = sum(float(a[i] * b[j] * weight[i, j] ** 2) for i in range(4) for j in range(3))
    assert relative_error(weight, other, b, a) == pytest.approx((above / below) ** 0.5, rel=1e-5)


def test_common_scales_cancel() -> None:
    weight, other = random_matrix(4, 3), random_matrix(4, 3, seed=5)
    b, a = random_importance(3), random_importance(4, seed=2)
    expected = relative_error(weight, other, b, a)
    assert relative_error(7 * weight, 7 * other, 1e-9 * b, 1e5 * a) == pytest.approx(expected)


def test_hand_case() -> None:
    weight, kept_three = torch.diag(torch.tensor([3.0, 2.0])), torch.diag(torch.tensor([3.0, 0.0]))
    rows = torch.tensor([1.0, 4.0])
    # Dropping the 2 loses 4 · 2² = 16 of 1 · 3² + 4 · 2² = 25.
    assert relative_error(weight, kept_three, None, rows) == pytest.approx((16 / 25) ** 0.5)
    assert relative_error(weight, kept_three) == pytest.approx((4 / 13) ** 0.5)
