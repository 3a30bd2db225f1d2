import pytest
import torch
from torch import Tensor

from lowrank_pl.core import singular_values, truncated_svd
from lowrank_pl.errors.numerics import NonFiniteError, RankError, ShapeError
from tests.core.matrices import random_matrix


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1)])
def test_full_rank_gives_the_weight_back(shape: tuple[int, int]) -> None:
    weight = random_matrix(*shape)
    factors = truncated_svd(weight, min(shape))
    torch.testing.assert_close(factors.product(), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_squared_error_is_the_tail_of_the_spectrum(rank: int) -> None:
    weight = random_matrix(9, 7, dtype=torch.float64)
    sigma = singular_values(weight)
    error = torch.linalg.norm(weight - truncated_svd(weight, rank).product()) ** 2
    torch.testing.assert_close(error, (sigma[rank:] ** 2).sum())


def test_diagonal_keeps_the_largest_entry() -> None:
    factors = truncated_svd(torch.diag(torch.tensor([2.0, -3.0, 1.0])), 1)
    torch.testing.assert_close(factors.sigma, torch.tensor([3.0]))
    torch.testing.assert_close(factors.product(), torch.diag(torch.tensor([0.0, -3.0, 0.0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_factors_come_in_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    factors = truncated_svd(random_matrix(6, 5, dtype=dtype), 3)
    assert {factors.left.dtype, factors.sigma.dtype, factors.right.dtype} == {dtype}
    assert (factors.left.shape, factors.sigma.shape, factors.right.shape) == ((6, 3), (3,), (3, 5))


def test_small_groups_of_an_ill_conditioned_float32_weight_survive() -> None:
    # Computed in float32, the last group would drown in the rounding of the first.
    u = torch.linalg.qr(random_matrix(8, 8, dtype=torch.float64)).Q
    v = torch.linalg.qr(random_matrix(8, 8, seed=1, dtype=torch.float64)).Q
    weight = ((u * torch.logspace(3, -6, 8, dtype=torch.float64)) @ v).float()
    tail = torch.linalg.svdvals(weight.double())[-1]
    torch.testing.assert_close(singular_values(weight)[-1], tail, rtol=1e-9, atol=0)
    torch.testing.assert_close(truncated_svd(weight, 8).sigma[-1].double(), tail, rtol=1e-6, atol=0)
    assert abs(float(torch.linalg.svdvals(weight)[-1] / tail) - 1) > 1e-2  # what float32 would give


def test_factors_are_orthonormal_ordered_and_own_their_memory() -> None:
    factors = truncated_svd(random_matrix(9, 7), 3)
    identity = torch.eye(3)
    torch.testing.assert_close(factors.left.mT @ factors.left, identity)
    torch.testing.assert_close(factors.right @ factors.right.mT, identity)
    assert bool((factors.sigma[:-1] >= factors.sigma[1:]).all())
    for tensor in (factors.left, factors.sigma, factors.right):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_singular_values_are_all_in_float64() -> None:
    sigma = singular_values(torch.diag(torch.tensor([1.0, 4.0, 2.0]))[:, :3])
    torch.testing.assert_close(sigma, torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))


def test_zero_weight_is_finite() -> None:
    product = truncated_svd(torch.zeros(4, 3), 2).product()
    assert torch.equal(product, torch.zeros(4, 3))


@pytest.mark.parametrize("rank", [0, -1, 5, 100])
def test_impossible_rank_is_refused(rank: int) -> None:
    with pytest.raises(RankError, match=rf"rank {rank} is impossible.*min\(out, in\) = 4"):
        truncated_svd(random_matrix(4, 6), rank)


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(2, 2, 2), torch.ones(0, 3), torch.tensor(1.0)])
def test_anything_but_a_matrix_is_refused(weight: Tensor) -> None:
    with pytest.raises(ShapeError) as caught:
        truncated_svd(weight, 1)
    assert f"weight has shape {tuple(weight.shape)}" in str(caught.value)
    assert "[out, in]" in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weight_is_refused_with_a_count(bad: float) -> None:
    weight = random_matrix(4, 3)
    weight[1, 2] = weight[0, 0] = bad
    with pytest.raises(NonFiniteError, match="weight contains 2 NaN or Inf entries"):
        truncated_svd(weight, 1)
    with pytest.raises(NonFiniteError, match="weight contains 2 NaN or Inf entries"):
        singular_values(weight)
