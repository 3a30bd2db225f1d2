"""m = 12 outputs, n = 9 inputs, rank 5 unless a test says otherwise."""

import pytest
import torch

from lowrank_pl.core import Factors, pivoted, truncated_svd
from tests.core.matrices import random_matrix


def factors(rank: int = 5, m: int = 12, n: int = 9) -> Factors:
    return truncated_svd(random_matrix(m, n).double(), rank)


@pytest.mark.parametrize(("m", "n", "rank"), [(12, 9, 5), (9, 12, 9), (12, 9, 9), (12, 9, 1), (3, 3, 3)])
def test_it_is_the_same_matrix_in_fewer_numbers(m: int, n: int, rank: int) -> None:
    given = factors(rank, m, n)
    found = pivoted(given)
    assert found.pivots.numel() + found.others.numel() == rank * (m + n - rank)
    torch.testing.assert_close(found.product(), given.product(), rtol=0, atol=1e-12)
    # Pivots are rows of the matrix, where the order says.
    for place in range(rank):
        row = int((found.order == place).nonzero())
        torch.testing.assert_close(found.pivots[place], given.product()[row], rtol=0, atol=1e-12)


def test_by_hand_the_largest_rows_are_the_pivots() -> None:
    weight = torch.tensor([[1.0, 0.0, 1.0], [4.0, 0.0, 4.0], [0.0, 2.0, 0.0], [2.0, 1.0, 2.0]])
    found = pivoted(truncated_svd(weight.double(), 2))
    assert found.order.tolist() == [2, 0, 1, 3]
    torch.testing.assert_close(found.pivots, weight[[1, 2]].double(), atol=1e-12, rtol=0)
    expected = torch.tensor([[0.25, 0.0], [0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(found.others, expected, atol=1e-12, rtol=0)


def test_no_coefficient_is_above_the_bound_where_lu_alone_lets_them_grow() -> None:
    given = factors(20, 60, 30)
    assert float(pivoted(given, bound=1e9).others.abs().max()) > 2
    for bound in (2.0, 1.1):
        found = pivoted(given, bound)
        assert float(found.others.abs().max()) <= bound
        torch.testing.assert_close(found.product(), given.product(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("zeros", [2, 5])
def test_singular_values_of_zero_leave_the_coefficients_bounded(zeros: int) -> None:
    given = factors()
    sigma = given.sigma.clone()
    sigma[5 - zeros :] = 0.0
    found = pivoted(Factors(given.left, sigma, given.right))
    assert float(found.others.abs().max()) <= 1.1
    torch.testing.assert_close(found.product(), (given.left * sigma) @ given.right, rtol=0, atol=1e-12)
    # Also where the factors themselves are rank deficient.
    left = given.left.clone()
    left[:, -1] = left[:, 0]
    deficient = Factors(left, given.sigma, given.right)
    torch.testing.assert_close(pivoted(deficient).product(), deficient.product(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_rounding_stays_that_of_the_dtype(dtype: torch.dtype, within: float) -> None:
    given = factors(60, 120, 90).to(dtype)
    found, exact = pivoted(given), given.to(torch.float64).product()
    assert found.pivots.dtype == found.others.dtype == dtype
    assert float((found.product().double() - exact).norm() / exact.norm()) < within


def test_an_order_that_is_given_is_kept() -> None:
    first, other = factors(), truncated_svd(random_matrix(12, 9, seed=4).double(), 5)
    order = pivoted(first).order
    found = pivoted(other, order=order)
    assert torch.equal(found.order, order)
    torch.testing.assert_close(found.product(), other.product(), rtol=0, atol=1e-10)
