"""m = 4 outputs, n = 5 inputs, 60 tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_pl.core import PairedSums, compensation, kronecker_svd
from lowrank_pl.errors.numerics import NonFiniteError, RangeError, ShapeError
from tests.core.matrices import random_matrix

M, N, T = 4, 5, 60


def tokens(seed: int) -> Tensor:
    return random_matrix(T, N, seed=seed, dtype=torch.float64) + 0.5


def sums(x: Tensor, z: Tensor) -> PairedSums:
    return PairedSums(z.mT @ z, x.mT @ z, x.sum(0), z.sum(0), torch.tensor(float(len(x))), (x - z).square().sum())


WEIGHT = random_matrix(M, N, dtype=torch.float64)


@pytest.mark.parametrize("ridge", [1e-1, None])
@pytest.mark.parametrize("bias", [False, True])
def test_where_nothing_has_changed_the_weight_stays_exactly(bias: bool, ridge: float | None) -> None:
    x = tokens(1)
    found = compensation(sums(x, x), ridge, bias)
    assert torch.equal(found.weight(WEIGHT), WEIGHT)
    if bias:
        shift = found.shift(WEIGHT, WEIGHT)
        assert shift is not None
        assert not shift.any()


def test_a_change_of_scale_is_undone() -> None:
    x = tokens(1)
    torch.testing.assert_close(compensation(sums(x, 2 * x), 1e-12, bias=False).weight(WEIGHT), WEIGHT / 2)


def test_a_shift_is_left_to_the_bias() -> None:
    x = tokens(1)
    found = compensation(sums(x, x + 3), 1e-9, bias=True)
    torch.testing.assert_close(found.weight(WEIGHT), WEIGHT)
    torch.testing.assert_close(found.shift(WEIGHT, WEIGHT), WEIGHT @ torch.full((N,), -3.0, dtype=torch.float64))


@pytest.mark.parametrize("bias", [False, True])
def test_no_other_factors_of_the_rank_put_out_anything_closer(bias: bool) -> None:
    x, z = tokens(1), 0.7 * tokens(1) + 0.5 * tokens(2)
    root = random_matrix(M, M, seed=9, dtype=torch.float64)
    metric = root @ root.mT
    found = compensation(sums(x, z), 1e-12, bias)
    left, right = kronecker_svd(found.weight(WEIGHT), 2, found.moment, metric, damping=0).balanced()
    shift = found.shift(WEIGHT, left @ right)
    constant = torch.zeros(M, dtype=torch.float64) if shift is None else shift

    def error(left: Tensor, right: Tensor, constant: Tensor) -> Tensor:
        return ((x @ WEIGHT.mT - z @ (left @ right).mT - constant) @ root).square().sum()

    parts = [part.clone().requires_grad_() for part in (left, right, constant)]
    error(*parts).backward()
    best = error(left, right, constant)
    for part in parts[: 3 if bias else 2]:
        assert part.grad is not None
        assert part.grad.abs().max() < 1e-6 * best
    plain = kronecker_svd(WEIGHT, 2, found.moment, metric, damping=0).balanced()
    assert best < error(*plain, constant)


def test_the_ridge_keeps_to_the_weight_where_there_are_few_tokens() -> None:
    x, z = tokens(1)[:3], tokens(2)[:3]
    near, far = (compensation(sums(x, z), ridge, bias=False).weight(WEIGHT) for ridge in (1e3, 1e-3))
    assert (near - WEIGHT).norm() < 1e-2 * (far - WEIGHT).norm()


def drawn(count: int, seed: int, share: float) -> tuple[Tensor, Tensor]:
    """Inputs of 20 features that a layer before has halved in ten directions, and what `share` of noise adds."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(count, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, x * torch.tensor([1.0, 0.5] * 10) + share * noise


@pytest.mark.parametrize(("count", "share"), [(60, 0.3), (60, 3.0), (2000, 0.3), (10, 0.3)])
def test_the_chosen_ridge_is_about_the_best_for_other_tokens(count: int, share: float) -> None:
    weight = random_matrix(M, 20, dtype=torch.float64)
    x, z = drawn(5000, 99, share)

    def error(ridge: float | None) -> float:
        """On tokens that were not looked at."""
        found = compensation(sums(*drawn(count, 5, share)), ridge, bias=False).weight(weight)
        return float((x @ weight.mT - z @ found.mT).square().sum())

    without = float((x @ weight.mT - z @ weight.mT).square().sum())
    best = min(without, *(error(10.0**exponent) for exponent in range(-4, 4)))
    assert error(None) <= (1.5 if count == 10 else 1.15) * best
    assert error(None) <= (1.1 if count == 10 else 1.0) * without


def test_few_tokens_that_say_little_change_little() -> None:
    x, z = tokens(1), tokens(1)
    z = z + 0.3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).sign()
    chosen, asked = (compensation(sums(x[:6], z[:6]), ridge, bias=False).weight(WEIGHT) for ridge in (None, 1e-3))
    assert (chosen - WEIGHT).norm() < 0.1 * (asked - WEIGHT).norm()


def test_an_input_that_is_always_zero_keeps_its_column() -> None:
    x, z = tokens(1), tokens(1)
    z[:, 2] = 0
    assert torch.equal(compensation(sums(x, z), 1e-3, bias=False).weight(WEIGHT)[:, 2], WEIGHT[:, 2])


def test_an_input_that_never_varies_has_no_variance_below_zero() -> None:
    # As features of a layer norm whose scale is zero; products and sums in float32, as they are measured.
    for value in torch.linspace(-2, 2, 41):
        x = tokens(1).float()
        x[:, 2] = value
        found = compensation(sums(x, x), None, bias=True)
        assert 0 <= float(found.moment[2, 2]) < 1e-5
        kronecker_svd(WEIGHT, 2, found.moment)


def test_without_the_dense_inputs_the_weight_is_the_target() -> None:
    z = tokens(2)
    found = compensation(PairedSums(z.mT @ z, None, z, z, torch.tensor(float(T)), torch.tensor(0.0)), 1e-3, bias=True)
    assert torch.equal(found.weight(WEIGHT), WEIGHT)
    torch.testing.assert_close(found.moment, z.mT @ z / T)
    assert found.shift(WEIGHT, WEIGHT) is None


def test_bad_inputs_are_refused() -> None:
    x = tokens(1)
    good = sums(x, x)
    with pytest.raises(RangeError, match="ridge"):
        compensation(good, 0.0, bias=False)
    with pytest.raises(ShapeError, match="cross"):
        compensation(PairedSums(good.gram, good.gram[:2], good.x, good.z, good.tokens, good.apart), 1e-3, bias=False)
    with pytest.raises(NonFiniteError, match="gram"):
        compensation(PairedSums(good.gram / 0, good.cross, good.x, good.z, good.tokens, good.apart), 1e-3, bias=False)
