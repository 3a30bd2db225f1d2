"""m = 6 outputs, n = 5 inputs, r = 2, 40 tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowrank_pl.core import kronecker_svd, refit_left, truncated_svd
from lowrank_pl.errors.numerics import NonFiniteError, RangeError, ShapeError
from tests.core.matrices import random_matrix

M, N, R, T = 6, 5, 2, 40


def tokens(seed: int = 3) -> Tensor:
    return random_matrix(T, N, seed=seed, dtype=torch.float64)


def pair(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    gram = random_matrix(M, M, seed=9, dtype=torch.float64)
    return kronecker_svd(weight, R, x.mT @ x, gram @ gram.mT, damping=0).balanced()


@pytest.mark.parametrize("ridge", [1e-9, 1e-3])
def test_nothing_changes_where_the_inputs_are_the_dense_ones(ridge: float) -> None:
    weight, x = random_matrix(M, N, dtype=torch.float64), tokens()
    left, right = pair(weight, x)
    z = x @ right.mT
    torch.testing.assert_close(refit_left(weight, left, x.mT @ z, z.mT @ z, ridge), left, rtol=1e-6, atol=1e-9)


def test_no_other_left_factor_comes_closer() -> None:
    weight, x = random_matrix(M, N, dtype=torch.float64), tokens()
    left, right = pair(weight, x)
    z = (x + 0.5 * tokens(seed=4)) @ right.mT
    found = refit_left(weight, left, x.mT @ z, z.mT @ z, 1e-12)

    def distance(a: Tensor) -> float:
        return float((x @ weight.mT - z @ a.mT).square().sum())

    assert distance(found) < distance(left)
    expected = torch.linalg.lstsq(z, x @ weight.mT).solution.mT
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_factor_of_full_rank_undoes_a_change_of_scale() -> None:
    weight, x = random_matrix(M, N, dtype=torch.float64), tokens()
    left, right = truncated_svd(weight, N).balanced()
    z = (2 * x) @ right.mT
    torch.testing.assert_close(refit_left(weight, left, x.mT @ z, z.mT @ z, 1e-12), left / 2)


def test_directions_without_samples_stay() -> None:
    weight, x = random_matrix(M, N, dtype=torch.float64), tokens()
    left, right = pair(weight, x)
    z = 1.5 * x @ right.mT
    z[:, 1] = 0
    found = refit_left(weight, left, x.mT @ z, z.mT @ z)
    assert torch.equal(found[:, 1], left[:, 1])
    nothing = torch.zeros_like(z)
    torch.testing.assert_close(refit_left(weight, left, x.mT @ nothing, nothing.mT @ nothing), left)


def test_bad_input_is_refused() -> None:
    weight, left = torch.ones(M, N), torch.ones(M, R)
    cross, gram = torch.ones(N, R), torch.eye(R)
    with pytest.raises(ShapeError, match="cross"):
        refit_left(weight, left, cross.mT, gram)
    with pytest.raises(ShapeError, match="left"):
        refit_left(weight, left[1:], cross, gram)
    with pytest.raises(NonFiniteError, match="gram"):
        refit_left(weight, left, cross, gram * math.nan)
    with pytest.raises(RangeError, match="ridge"):
        refit_left(weight, left, cross, gram, 0.0)
