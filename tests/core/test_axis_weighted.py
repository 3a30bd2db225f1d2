"""m = 9 outputs, n = 7 inputs unless a test says otherwise; `a` weighs outputs, `b` inputs."""

import itertools

import pytest
import torch
from torch import Tensor

from lowrank_pl.core import Factors, axis_weighted_svd, truncated_svd
from lowrank_pl.errors.numerics import ImportanceError, NonFiniteError, RangeError, RankError, ShapeError
from tests.core.matrices import random_importance, random_matrix

M, N = 9, 7
SIDES = ["input", "output", "both"]


def importances(side: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor | None, Tensor | None]:
    b = random_importance(N, seed=1, dtype=dtype) if side in ("input", "both") else None
    a = random_importance(M, seed=2, dtype=dtype) if side in ("output", "both") else None
    return b, a


def weighted_error(weight: Tensor, product: Tensor, b: Tensor | None, a: Tensor | None) -> Tensor:
    """`Σ_ij a_i b_j (W − P)_ij²`."""
    b = torch.ones(weight.shape[1], dtype=weight.dtype) if b is None else b
    a = torch.ones(weight.shape[0], dtype=weight.dtype) if a is None else a
    return (torch.outer(a, b) * (weight - product) ** 2).sum()


@pytest.mark.parametrize("side", SIDES)
def test_full_rank_gives_the_weight_back(side: str) -> None:
    weight = random_matrix(M, N, dtype=torch.float64)
    product = axis_weighted_svd(weight, N, *importances(side)).product()
    torch.testing.assert_close(product, weight)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_equal_importances_give_plain_svd(rank: int) -> None:
    weight = random_matrix(M, N, dtype=torch.float64)
    plain = truncated_svd(weight, rank).product()
    b, a = torch.full((N,), 0.3), torch.full((M,), 5.0)
    for given in ((None, None), (b, None), (None, a), (b, a)):
        torch.testing.assert_close(axis_weighted_svd(weight, rank, *given).product(), plain)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_scaling_importances_changes_nothing(side: str, scale: float) -> None:
    weight = random_matrix(M, N, dtype=torch.float64)
    b, a = importances(side)
    expected = axis_weighted_svd(weight, 3, b, a).product()
    scaled = (scale * b if b is not None else None, scale * a if a is not None else None)
    torch.testing.assert_close(axis_weighted_svd(weight, 3, *scaled).product(), expected)


def test_hand_case_svd_keeps_the_three_and_row_weights_keep_the_two() -> None:
    weight, rows = torch.diag(torch.tensor([3.0, 2.0])), torch.tensor([1.0, 4.0])
    plain = truncated_svd(weight, 1).product()
    weighted = axis_weighted_svd(weight, 1, output_importance=rows).product()
    torch.testing.assert_close(plain, torch.diag(torch.tensor([3.0, 0.0])))
    torch.testing.assert_close(weighted, torch.diag(torch.tensor([0.0, 2.0])))
    torch.testing.assert_close(weighted_error(weight, plain, None, rows), torch.tensor(16.0))
    torch.testing.assert_close(weighted_error(weight, weighted, None, rows), torch.tensor(9.0))


def test_transposing_exchanges_the_sides() -> None:
    weight, (b, a) = random_matrix(M, N, dtype=torch.float64), importances("both")
    straight = axis_weighted_svd(weight, 3, b, a).product()
    torch.testing.assert_close(axis_weighted_svd(weight.mT, 3, a, b).product(), straight.mT)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_input_side_is_the_formula_of_the_paper(rank: int) -> None:
    weight, (b, _) = random_matrix(M, N, dtype=torch.float64), importances("input")
    assert b is not None
    d = torch.diag(b.sqrt())
    u, s, vh = torch.linalg.svd(weight @ d, full_matrices=False)
    left = u[:, :rank] * s[:rank]
    right = vh[:rank] @ torch.linalg.inv(d)
    product = axis_weighted_svd(weight, rank, input_importance=b, damping=0).product()
    torch.testing.assert_close(product, left @ right)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_error_is_the_tail_of_the_weighted_spectrum(side: str, rank: int) -> None:
    weight, (b, a) = random_matrix(M, N, dtype=torch.float64), importances(side)
    scaled = weight * (b.sqrt() if b is not None else 1.0)
    scaled = scaled * (a.sqrt()[:, None] if a is not None else 1.0)
    tail = (torch.linalg.svdvals(scaled)[rank:] ** 2).sum()
    product = axis_weighted_svd(weight, rank, b, a, damping=0).product()
    torch.testing.assert_close(weighted_error(weight, product, b, a), tail)


@pytest.mark.parametrize("side", SIDES)
def test_never_worse_than_svd_or_a_neighbour_in_its_own_norm(side: str) -> None:
    weight, (b, a) = random_matrix(M, N, dtype=torch.float64), importances(side)
    factors = axis_weighted_svd(weight, 3, b, a, damping=0)
    own = float(weighted_error(weight, factors.product(), b, a))
    plain = float(weighted_error(weight, truncated_svd(weight, 3).product(), b, a))
    assert own < 0.99 * plain
    left, right = factors.balanced()
    for seed, step in itertools.product(range(20), (1e-3, 1e-1)):
        other = (left + step * random_matrix(M, 3, seed=seed, dtype=torch.float64)) @ (
            right + step * random_matrix(3, N, seed=100 + seed, dtype=torch.float64)
        )
        assert float(weighted_error(weight, other, b, a)) >= own


@pytest.mark.parametrize("side", SIDES)
def test_gradient_descent_from_elsewhere_ends_at_the_same_error(side: str) -> None:
    weight, (b, a) = random_matrix(M, N, dtype=torch.float64), importances(side)
    best = axis_weighted_svd(weight, 2, b, a, damping=0)
    own = float(weighted_error(weight, best.product(), b, a))
    plain = truncated_svd(weight, 2).balanced()
    for start in (best.balanced(), plain):
        parts = [part.clone().requires_grad_() for part in start]
        solver = torch.optim.LBFGS(parts, max_iter=400, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure(parts: list[Tensor] = parts, solver: torch.optim.LBFGS = solver) -> float:
            solver.zero_grad()
            loss = weighted_error(weight, parts[0] @ parts[1], b, a)
            torch.autograd.backward(loss)
            return float(loss.detach())

        solver.step(closure)
        refined = float(weighted_error(weight, (parts[0] @ parts[1]).detach(), b, a))
        assert refined >= own * (1 - 1e-9)
        if start is plain:
            # The refinement really moved: the plain start was clearly worse than the optimum it reached.
            assert refined == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_zero_importances_are_finite_and_cost_nothing(side: str, damping: float) -> None:
    weight, (b, a) = random_matrix(M, N, dtype=torch.float64), importances(side)
    if b is not None:
        b[:3] = 0
    if a is not None:
        a[2:5] = 0
    factors = axis_weighted_svd(weight, 4, b, a, damping)
    assert_finite(factors)
    if side != "output":  # four inputs matter: rank 4 reproduces them
        assert float(weighted_error(weight, factors.product(), b, a)) < 1e-4
    # Inputs that never mattered are still approximated, not thrown away.
    if side == "input":
        assert float((weight - factors.product())[:, :3].norm() / weight[:, :3].norm()) < 1


@pytest.mark.parametrize("side", SIDES)
def test_all_zero_importances_give_plain_svd(side: str) -> None:
    weight, (b, a) = random_matrix(M, N, dtype=torch.float64), importances(side)
    zeros = (torch.zeros_like(b) if b is not None else None, torch.zeros_like(a) if a is not None else None)
    torch.testing.assert_close(axis_weighted_svd(weight, 3, *zeros).product(), truncated_svd(weight, 3).product())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("side", SIDES)
def test_importances_over_twelve_orders_are_finite_in_every_dtype(dtype: torch.dtype, side: str) -> None:
    weight = random_matrix(M, N, dtype=dtype)
    b = torch.logspace(-12, 0, N) if side in ("input", "both") else None
    a = torch.logspace(0, -12, M) if side in ("output", "both") else None
    factors = axis_weighted_svd(weight, 3, b, a)
    assert_finite(factors)
    assert {factors.left.dtype, factors.sigma.dtype, factors.right.dtype} == {dtype}
    exact = axis_weighted_svd(weight.double(), 3, b, a)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(
        factors.product().double(), exact.product(), rtol=0, atol=tolerance * float(weight.norm())
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [1, 4, N])
def test_factors_are_orthonormal_with_the_spectrum_of_the_approximation(side: str, rank: int) -> None:
    factors = axis_weighted_svd(random_matrix(M, N, dtype=torch.float64), rank, *importances(side))
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(factors.left.mT @ factors.left, identity)
    torch.testing.assert_close(factors.right @ factors.right.mT, identity)
    torch.testing.assert_close(factors.sigma, torch.linalg.svdvals(factors.product())[:rank])
    assert factors.rank == rank


def test_tiny_importances_still_weigh() -> None:
    # An absolute damping would swallow a Fisher information of this size and return plain SVD.
    weight, rows = torch.diag(torch.tensor([3.0, 2.0])), torch.tensor([1e-20, 4e-20])
    product = axis_weighted_svd(weight, 1, output_importance=rows).product()
    torch.testing.assert_close(product, torch.diag(torch.tensor([0.0, 2.0])))


def test_damping_leads_from_the_weighted_to_the_plain_solution() -> None:
    weight, rows = torch.diag(torch.tensor([3.0, 2.0])), torch.tensor([1.0, 4.0])
    product = axis_weighted_svd(weight, 1, output_importance=rows, damping=100.0).product()
    torch.testing.assert_close(product, torch.diag(torch.tensor([3.0, 0.0])))


@pytest.mark.parametrize("damping", [-1e-9, float("nan"), float("inf")])
def test_bad_damping_is_refused(damping: float) -> None:
    with pytest.raises(RangeError) as caught:
        axis_weighted_svd(random_matrix(M, N), 2, random_importance(N), damping=damping)
    assert f"damping={damping!r}" in str(caught.value)


def test_errors_name_the_side_and_the_shape() -> None:
    weight = random_matrix(M, N)
    with pytest.raises(ShapeError, match=r"input_importance has shape \(9,\), expected \[7\]"):
        axis_weighted_svd(weight, 2, input_importance=torch.ones(M))
    with pytest.raises(ShapeError, match=r"output_importance has shape \(7,\), expected \[9\]"):
        axis_weighted_svd(weight, 2, output_importance=torch.ones(N))
    with pytest.raises(ImportanceError, match=r"input_importance has the negative entry -1\.0 at \(0,\)"):
        axis_weighted_svd(weight, 2, input_importance=-torch.ones(N))
    with pytest.raises(NonFiniteError, match="output_importance contains 9 NaN or Inf"):
        axis_weighted_svd(weight, 2, output_importance=torch.full((M,), float("nan")))
    with pytest.raises(RankError, match=r"rank 8 is impossible.*= 7"):
        axis_weighted_svd(weight, 8, random_importance(N))
    with pytest.raises(ShapeError, match=r"weight has shape \(9,\)"):
        axis_weighted_svd(torch.ones(M), 1, random_importance(N))
    with pytest.raises(NonFiniteError, match="weight contains 63 NaN or Inf"):
        axis_weighted_svd(weight * float("nan"), 2, random_importance(N))


def assert_finite(factors: Factors) -> None:
    for part in (factors.left, factors.sigma, factors.right):
        assert bool(torch.isfinite(part).all())
