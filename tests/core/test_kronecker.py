"""m = 9 outputs, n = 7 inputs unless a test says otherwise; `C` weighs inputs, `G` outputs."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lowrank_pl.core import (
    KroneckerGroups,
    axis_weighted_svd,
    kronecker_groups,
    kronecker_regroup,
    kronecker_svd,
    nearest_kronecker,
    truncated_svd,
)
from lowrank_pl.errors.numerics import ImportanceError, NonFiniteError, RangeError, RankError, ShapeError
from tests.core.matrices import random_importance, random_matrix

M, N = 9, 7
SHAPES = [(9, 7), (7, 9), (8, 8), (1, 5), (5, 1)]


def moment(size: int, seed: int, samples: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """`Σ x xᵀ` of ill-scaled vectors; singular with fewer samples than `size`."""
    x = random_matrix(samples or 4 * size, size, seed=seed, dtype=torch.float64) * random_importance(size, seed).sqrt()
    return (x.mT @ x).to(dtype)


def error(weight: Tensor, product: Tensor, c: Tensor, g: Tensor) -> Tensor:
    """`‖G^½ (W − P) C^½‖_F²` by its definition, `tr(G D C Dᵀ)`."""
    difference = weight - product
    return torch.trace(g @ difference @ c @ difference.mT)


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("samples", [None, 3])
def test_full_rank_gives_the_weight_back(m: int, n: int, samples: int | None) -> None:
    weight = random_matrix(m, n, dtype=torch.float64)
    product = kronecker_svd(weight, min(m, n), moment(n, 1, samples), moment(m, 2, samples)).product()
    torch.testing.assert_close(product, weight)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("samples", [None, 3])
def test_the_transposed_weight_has_the_transposed_groups(m: int, n: int, samples: int | None) -> None:
    weight, c, g = random_matrix(m, n, dtype=torch.float64), moment(n, 1, samples), moment(m, 2, samples)
    found, other = kronecker_groups(weight, c, g), kronecker_groups(weight.mT, g, c)
    torch.testing.assert_close(found.energies, other.energies)
    for rank in range(1, min(m, n, samples or m)):
        torch.testing.assert_close(found.factors(rank).product(), other.factors(rank).product().mT)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_identities_give_plain_svd(m: int, n: int, rank: int) -> None:
    weight = random_matrix(m, n, dtype=torch.float64)
    rank = min(rank, m, n)
    plain = truncated_svd(weight, rank).product()
    c, g = 3 * torch.eye(n, dtype=torch.float64), 0.2 * torch.eye(m, dtype=torch.float64)
    for given in ((None, None), (c, None), (None, g), (c, g), (torch.zeros(n, n), torch.zeros(m))):
        torch.testing.assert_close(kronecker_svd(weight, rank, *given).product(), plain)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
def test_diagonals_give_the_two_sided_closed_form(rank: int, damping: float) -> None:
    weight, b, a = random_matrix(M, N, dtype=torch.float64), random_importance(N, 1), random_importance(M, 2)
    expected = axis_weighted_svd(weight, rank, b, a, damping=damping).product()
    for c, g in ((b, a), (b.diag(), a.diag()), (b, a.diag())):
        torch.testing.assert_close(kronecker_svd(weight, rank, c, g, damping).product(), expected, rtol=1e-4, atol=1e-6)


def test_a_diagonal_as_vector_matrix_or_blocks_is_the_same() -> None:
    weight, c = random_matrix(6, 4, dtype=torch.float64), moment(2, 1)
    whole = torch.block_diag(c, 2 * c)
    blocks = torch.stack([c, 2 * c])
    torch.testing.assert_close(kronecker_svd(weight, 2, blocks).product(), kronecker_svd(weight, 2, whole).product())
    b = random_importance(4, dtype=torch.float64)
    torch.testing.assert_close(kronecker_svd(weight, 2, b).product(), kronecker_svd(weight, 2, b.diag()).product())


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_scaling_moments_changes_no_factor_and_scales_energies(scale: float) -> None:
    weight, c, g = random_matrix(M, N, dtype=torch.float64), moment(N, 1), moment(M, 2)
    plain, scaled = kronecker_groups(weight, c, g), kronecker_groups(weight, scale * c, scale * g)
    torch.testing.assert_close(scaled.factors(3).product(), plain.factors(3).product())
    torch.testing.assert_close(scaled.energies, scale * scale * plain.energies)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_energies_are_what_the_objective_loses(m: int, n: int) -> None:
    weight, c, g = random_matrix(m, n, dtype=torch.float64), moment(n, 1), moment(m, 2)
    groups = kronecker_groups(weight, c, g)
    c, g = damped(c, 1e-3), damped(g, 1e-3)
    for rank in range(1, min(m, n)):
        lost = error(weight, groups.factors(rank).product(), c, g)
        torch.testing.assert_close(groups.energies[rank:].sum(), lost, rtol=1e-7, atol=1e-9 * float(lost))
        total = float(groups.energies.sum())
        assert groups.relative_error(rank) == pytest.approx(math.sqrt(float(lost) / total))
    assert bool((groups.energies.diff() <= 0).all())


def test_no_other_factors_of_the_rank_are_better() -> None:
    weight, c, g = random_matrix(6, 5, dtype=torch.float64), moment(5, 1), moment(6, 2)
    found = error(weight, kronecker_svd(weight, 2, c, g, damping=0).product(), c, g)
    for seed in range(5):
        a = random_matrix(6, 2, seed=10 + seed, dtype=torch.float64).requires_grad_()
        b = random_matrix(2, 5, seed=20 + seed, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.LBFGS([a, b], max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure(a: Tensor = a, b: Tensor = b, optimizer: torch.optim.LBFGS = optimizer) -> float:
            optimizer.zero_grad()
            loss = error(weight, a @ b, c, g)
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)
        reached = error(weight, (a @ b).detach(), c, g)
        assert float(reached) >= float(found) * (1 - 1e-9)
    # The last run has found the optimum too: it is one, not a bound that nothing reaches.
    torch.testing.assert_close(reached, found, rtol=1e-4, atol=0)


def test_never_above_the_others_in_its_own_norm() -> None:
    for seed, rank in itertools.product(range(5), (1, 3, 5)):
        weight, c, g = random_matrix(M, N, seed=seed, dtype=torch.float64), moment(N, seed + 1), moment(M, seed + 2)
        own = error(weight, kronecker_svd(weight, rank, c, g, damping=0).product(), c, g)
        others = [
            truncated_svd(weight, rank),
            axis_weighted_svd(weight, rank, c.diagonal(), g.diagonal()),
            kronecker_svd(weight, rank, c),
            kronecker_svd(weight, rank, None, g),
        ]
        for other in others:
            assert float(own) <= float(error(weight, other.product(), c, g)) * (1 + 1e-9)


def test_a_hand_case_by_correlation() -> None:
    # Inputs always equal: their difference never shows, and rank 1 is exact where it matters.
    weight = torch.tensor([[3.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    together = torch.ones(2, 2, dtype=torch.float64)
    product = kronecker_svd(weight, 1, together, damping=1e-9).product()
    x = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(product @ x, weight @ x, rtol=1e-6, atol=0)
    assert kronecker_groups(weight, together, damping=0).relative_error(1) < 1e-5


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_singular_moments_give_finite_factors_that_are_exact_where_it_counts(damping: float) -> None:
    weight = random_matrix(M, N, dtype=torch.float64)
    x = random_matrix(3, N, seed=5, dtype=torch.float64)
    dead = moment(M, 2)
    dead[4], dead[:, 4] = 0, 0  # an output that no loss depends on
    for g in (None, dead, moment(M, 2, samples=2)):
        product = kronecker_svd(weight, 3, x.mT @ x, g, damping).product()
        assert bool(torch.isfinite(product).all())
    # Three inputs span three directions: rank 3 loses nothing on them.
    exact = kronecker_svd(weight, 3, x.mT @ x, None, damping=1e-9).product()
    torch.testing.assert_close(x @ exact.mT, x @ weight.mT, rtol=1e-5, atol=1e-6)


def test_a_constant_input_and_indefinite_rounding_are_survived() -> None:
    weight = random_matrix(M, N, dtype=torch.float64)
    constant = torch.ones(N, N, dtype=torch.float64)
    constant[0, 0] -= 1e-9  # as rounding would: no longer positive semi-definite
    product = kronecker_svd(weight, 2, constant, damping=0).product()
    assert bool(torch.isfinite(product).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_have_the_weight_s_dtype(dtype: torch.dtype) -> None:
    weight = random_matrix(M, N, dtype=dtype)
    factors = kronecker_svd(weight, 3, moment(N, 1, dtype=torch.float32), moment(M, 2, dtype=torch.float32))
    assert {factors.left.dtype, factors.sigma.dtype, factors.right.dtype} == {dtype}


def test_float32_groups_lose_only_rounding() -> None:
    weight, c, g = random_matrix(40, 30), moment(30, 1), moment(40, 2)
    exact = kronecker_svd(weight.double(), 10, c, g).product()
    rounded = kronecker_groups(weight, c, g).factors(10).product()
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-4)


def test_first_keeps_energies_and_fewer_groups() -> None:
    groups: KroneckerGroups = kronecker_groups(random_matrix(M, N), moment(N, 1), moment(M, 2))
    first = groups.first(3)
    assert first.left.shape == (M, 3)
    assert first.right.shape == (3, N)
    torch.testing.assert_close(first.energies, groups.energies)
    torch.testing.assert_close(first.factors(3).product(), groups.factors(3).product())
    assert first.left.untyped_storage().nbytes() == first.left.numel() * first.left.element_size()


def test_bad_input_is_refused() -> None:
    weight, c = random_matrix(M, N), moment(N, 1)
    with pytest.raises(RankError):
        kronecker_svd(weight, 8)
    with pytest.raises(ShapeError, match="input_moment"):
        kronecker_svd(weight, 3, moment(M, 1))
    with pytest.raises(ShapeError, match="output_moment"):
        kronecker_svd(weight, 3, c, torch.ones(3, 3, 3, 3))
    with pytest.raises(NonFiniteError):
        kronecker_svd(weight, 3, c * math.inf)
    with pytest.raises(NonFiniteError):
        kronecker_svd(weight * math.nan, 3, c)
    bad = c.clone()
    bad[2, 2] = -1
    with pytest.raises(ImportanceError, match=r"\(2, 2\)"):
        kronecker_svd(weight, 3, bad)
    for damping in (-1.0, math.nan, math.inf):
        with pytest.raises(RangeError):
            kronecker_svd(weight, 3, c, damping=damping)


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("samples", [None, 3])
def test_a_product_is_grouped_as_the_weight_that_it_is(rank: int, samples: int | None) -> None:
    a, b = random_matrix(M, rank, seed=3, dtype=torch.float64), random_matrix(rank, N, seed=4, dtype=torch.float64)
    c, g = moment(N, 1, samples), moment(M, 2, samples)
    whole, found = kronecker_groups(a @ b, c, g), kronecker_regroup(a, b, c, g)
    assert (found.left.shape, found.right.shape, found.energies.shape) == ((M, rank), (rank, N), (rank,))
    torch.testing.assert_close(found.energies, whole.energies[:rank], rtol=1e-9, atol=1e-12 * float(whole.energies[0]))
    for kept in range(1, rank + 1):
        torch.testing.assert_close(found.factors(kept).product(), whole.factors(kept).product())


def test_factors_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ShapeError, match="as many rows as left has columns"):
        kronecker_regroup(random_matrix(M, 2), random_matrix(3, N))
    with pytest.raises(NonFiniteError):
        kronecker_regroup(random_matrix(M, 2) * math.nan, random_matrix(2, N))


def test_the_nearest_kronecker_product_to_a_sum_of_two() -> None:
    a, b = torch.tensor([1.0, 3.0]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    exact = nearest_kronecker((a, b), (2 * a, 0.5 * b))
    torch.testing.assert_close(exact[0], torch.tensor([0.25, 0.75]).double())
    torch.testing.assert_close(torch.kron(exact[0][:, None], exact[1]), 2 * torch.kron(a[:, None], b).double())
    other, moment = torch.tensor([4.0, 0.5]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    wanted = torch.outer(a, b.flatten()) + torch.outer(other, moment.flatten())
    left, right = nearest_kronecker((a, b), (other, moment))
    torch.testing.assert_close(torch.outer(left, right.flatten()), truncated_svd(wanted.double(), 1).product())
    assert bool((left > 0).all())
    assert bool((torch.linalg.eigvalsh(right) > 0).all())
