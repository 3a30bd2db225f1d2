"""n = 8 inputs, m = 6 outputs: two factors have 14 numbers per rank, so they fit into 48 up to rank 3."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_pl.core import truncated_svd
from lowrank_pl.errors.numerics import RankError, ShapeError
from lowrank_pl.nn import ElasticLinear, LowRankLinear
from lowrank_pl.nn.elastic_linear import join_, split
from tests.core.matrices import random_matrix


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return random_matrix(*shape, seed=seed, dtype=torch.float64)


def dense(bias: bool = True) -> nn.Linear:
    linear = nn.Linear(8, 6, bias, dtype=torch.float64)
    for seed, parameter in enumerate(linear.parameters()):
        parameter.data.copy_(matrix(*parameter.shape, seed=seed))
    return linear


def factorised(rank: int = 2, bias: bool = True) -> ElasticLinear:
    layer = ElasticLinear.from_linear(dense(bias))
    layer.write_(matrix(6, rank, seed=3), matrix(rank, 8, seed=4))
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_it_begins_as_the_dense_layer(bias: bool) -> None:
    linear, x = dense(bias), matrix(2, 3, 8, seed=2)
    layer = ElasticLinear.from_linear(linear)
    assert layer.is_dense
    assert layer.rank == 6
    assert torch.equal(layer(x), linear(x))
    assert torch.equal(layer.product(), linear.weight)
    assert torch.equal(layer.weight, linear.weight)
    assert [name for name, _ in layer.named_parameters()] == ["storage", "bias"][: 1 + bias]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_two_factors_lie_in_the_same_parameter(rank: int, bias: bool) -> None:
    layer = ElasticLinear.from_linear(dense(bias))
    parameter, left, right = layer.storage, matrix(6, rank, seed=3), matrix(rank, 8, seed=4)
    layer.write_(left, right)
    assert layer.storage is parameter
    assert layer.rank == rank
    assert all(torch.equal(own, given) for own, given in zip(layer.factors(), (left, right), strict=True))
    assert not layer.storage.detach().view(-1)[14 * rank :].any()
    x = matrix(5, 8, seed=2)
    torch.testing.assert_close(layer(x), F.linear(x, left @ right, layer.bias))
    assert layer.weight.shape == (6, 8)
    torch.testing.assert_close(layer.weight @ x.T, left @ right @ x.T)


def test_gradients_are_those_of_two_factors_and_zero_behind_them() -> None:
    layer, x, g = factorised(2), matrix(5, 8, seed=2), matrix(5, 6, seed=5)
    reference = LowRankLinear(8, 6, 2, dtype=torch.float64)
    reference.load_state_dict(ElasticLinear.deployed(layer.state_dict()).state)  # type: ignore[union-attr]
    layer(x).backward(g)
    reference(x).backward(g)
    assert layer.storage.grad is not None
    left, right = split(layer.storage.grad, 2)
    torch.testing.assert_close(left, reference.left.weight.grad)
    torch.testing.assert_close(right, reference.right.weight.grad)
    assert layer.bias is not None
    torch.testing.assert_close(layer.bias.grad, reference.left.bias.grad)
    assert not layer.storage.grad.view(-1)[28:].any()


def test_the_rest_stays_zero_under_momentum_and_decay() -> None:
    layer = factorised(2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        layer(matrix(5, 8, seed=step)).square().sum().backward()
        optimizer.step()
    assert not layer.storage.detach().view(-1)[28:].any()


@pytest.mark.parametrize("rank", [4, 5, 7])
def test_ranks_without_room_are_refused_and_nothing_changes(rank: int) -> None:
    layer = ElasticLinear.from_linear(dense())
    before = layer.storage.detach().clone()
    with pytest.raises(RankError):
        layer.write_(matrix(6, rank), matrix(rank, 8))
    with pytest.raises(RankError):
        layer.rank = rank
    assert layer.is_dense
    assert torch.equal(layer.storage, before)


def test_factors_of_another_shape_are_refused() -> None:
    layer = ElasticLinear.from_linear(dense())
    with pytest.raises(ShapeError, match=r"factors\.left"):
        layer.write_(matrix(5, 2), matrix(2, 8))
    with pytest.raises(ShapeError, match=r"factors\.right"):
        layer.write_(matrix(6, 2), matrix(2, 7))
    with pytest.raises(RankError):
        layer.factors()


@pytest.mark.parametrize("rank", [0, 2])
def test_compact_and_state_dict_travel(rank: int) -> None:
    layer = factorised(rank) if rank else ElasticLinear.from_linear(dense())
    x = matrix(5, 8, seed=2)
    final = layer.compact()
    assert type(final) is (LowRankLinear if rank else nn.Linear)
    assert torch.equal(final(x), layer(x))
    other = ElasticLinear.empty({}, dense())
    other.load_state_dict(layer.state_dict())
    assert (other.rank, other.is_dense) == (layer.rank, rank == 0)
    assert torch.equal(other(x), layer(x))
    torch.testing.assert_close(ElasticLinear.product_of(layer.state_dict()), layer.product())


def test_assign_splits_singular_values_evenly() -> None:
    layer = ElasticLinear.from_linear(dense())
    factors = truncated_svd(layer.storage.detach(), 2)
    layer.assign_(factors)
    torch.testing.assert_close(layer.product(), factors.product())
    left, right = layer.factors()
    torch.testing.assert_close(left.square().sum(0), right.square().sum(1))


@pytest.mark.parametrize("rank", [0, 2])
def test_an_observer_sees_inputs_and_output_gradients_of_training_alone(rank: int) -> None:
    layer = factorised(rank) if rank else ElasticLinear.from_linear(dense())
    seen: list[tuple[Tensor, Tensor]] = []
    layer.observer = lambda x, g: seen.append((x, g))
    x, g = matrix(2, 3, 8, seed=2), matrix(2, 3, 6, seed=5)
    with torch.no_grad():
        layer(x)
    assert seen == []
    y = layer(x)
    y.add_(1.0)  # as some models do
    y.backward(g)
    ((inputs, gradient),) = seen
    assert torch.equal(inputs, x)
    assert torch.equal(gradient, g)
    layer.observer = None
    layer(x).backward(g)
    assert len(seen) == 1


def test_copies_are_their_own() -> None:
    layer = factorised(2)
    other: Any = copy.deepcopy(layer)
    join_(layer.storage.data, matrix(6, 1), matrix(1, 8))
    assert not torch.equal(other.storage, layer.storage)
    assert other.rank == 2
    assert "rank=2" in repr(other)
