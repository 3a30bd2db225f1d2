"""n = 8 inputs, m = 6 outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adafactor, Adam, Adamax, AdamW, Optimizer, RMSprop, Rprop

from lowrank_pl.core import truncated_svd
from lowrank_pl.errors.optimizer import OptimizerStateError, UnknownOptimizerStateError
from lowrank_pl.nn import ElasticLinear
from lowrank_pl.nn.elastic_linear import split
from lowrank_pl.surgery import ChangeOfBasis, follow_, reform_
from tests.core.matrices import random_matrix

Make = Callable[[list[nn.Parameter]], Optimizer]


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return random_matrix(*shape, seed=seed, dtype=torch.float64)


def layer_of(rank: int) -> ElasticLinear:
    """Dense at rank 0."""
    layer = ElasticLinear(8, 6, dtype=torch.float64)
    layer.storage.data.copy_(matrix(6, 8))
    if rank:
        layer.write_(matrix(6, rank, seed=3), matrix(rank, 8, seed=4))
    return layer


def truncated(layer: ElasticLinear, rank: int) -> tuple[Tensor, Tensor]:
    """New factors of the present product, at scales of their own."""
    left, right = truncated_svd(layer.product().detach(), rank).balanced()
    return left * 1.5, right / 1.5


def gradient(layer: ElasticLinear, seed: int) -> Tensor:
    layer.storage.grad = None
    (layer.product() * matrix(6, 8, seed=seed)).sum().backward()
    assert layer.storage.grad is not None
    return layer.storage.grad.clone()


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_averaged_gradient_is_that_of_the_new_factors(before: int, rank: int) -> None:
    """`∂L/∂W` is the same before and after where the product is linear in the loss."""
    layer = layer_of(before)
    left, right = truncated(layer, rank)
    average = 0.5 * gradient(layer, 10) + 0.25 * gradient(layer, 11)
    change = ChangeOfBasis.between(layer, left, right)
    found = change.of(average, squares=False)
    layer.write_(left, right)
    expected = 0.5 * gradient(layer, 10) + 0.25 * gradient(layer, 11)
    for own, part in zip(found, split(expected, rank), strict=True):
        torch.testing.assert_close(own, part)


@pytest.mark.parametrize("before", [0, 3])
def test_squares_follow_as_if_entries_were_independent(before: int) -> None:
    """Over gradients `E` with independent entries of unit variance the mean square is exact."""
    layer = layer_of(before)
    left, right = truncated(layer, 2)
    change = ChangeOfBasis.between(layer, left, right)
    ones = torch.ones(6, 8, dtype=torch.float64)
    found_left, found_right = change.of(ones, squares=True)
    assert bool((found_left > 0).all())
    if before == 0:
        torch.testing.assert_close(found_left, right.square().sum(1).expand(6, 2))
        torch.testing.assert_close(found_right, left.square().sum(0)[:, None].expand(2, 8))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: AdamW(p, lr=0.01),
        lambda p: AdamW(p, lr=0.01, fused=True),
        lambda p: Adam(p, lr=0.01, amsgrad=True),
        lambda p: SGD(p, lr=0.01, momentum=0.9),
        lambda p: SGD(p, lr=0.01),
    ],
    ids=["adamw", "fused", "amsgrad", "momentum", "sgd"],
)
@pytest.mark.parametrize("before", [0, 3])
def test_training_goes_on_with_the_same_parameter(make: Make, before: int) -> None:
    layer = layer_of(before)
    parameter, optimizer = layer.storage, make(list(layer.parameters()))
    for step in range(3):
        gradient(layer, step)
        optimizer.step()
    left, right = truncated(layer, 2)
    product = left @ right
    reform_(layer, left, right, [optimizer])
    assert layer.storage is parameter
    torch.testing.assert_close(layer.product(), product)
    for name, state in optimizer.state[parameter].items():
        if isinstance(state, Tensor) and state.shape == parameter.shape:
            assert not state.view(-1)[28:].any(), name
            assert "sq" not in name or bool((state >= 0).all())
    gradient(layer, 5)
    optimizer.step()
    assert not layer.storage.detach().view(-1)[28:].any()
    assert bool(torch.isfinite(layer.storage).all())


def test_state_of_another_shape_is_refused_and_nothing_changes() -> None:
    layer = layer_of(0)
    optimizer = Adafactor(list(layer.parameters()))
    gradient(layer, 0)
    optimizer.step()
    before = layer.storage.detach().clone()
    with pytest.raises(OptimizerStateError, match="Adafactor"):
        reform_(layer, *truncated(layer, 2), [optimizer])
    assert torch.equal(layer.storage, before)
    assert layer.is_dense


@pytest.mark.parametrize("make", [lambda p: ASGD(p, lr=0.01), lambda p: Rprop(p, lr=0.01)], ids=["asgd", "rprop"])
def test_state_that_is_no_average_of_gradients_is_refused_and_nothing_changes(make: Make) -> None:
    layer = layer_of(0)
    optimizer = make(list(layer.parameters()))
    gradient(layer, 0)
    optimizer.step()
    before = layer.storage.detach().clone()
    with pytest.raises(UnknownOptimizerStateError, match=r"keeps '(ax|prev)'"):
        reform_(layer, *truncated(layer, 2), [optimizer])
    assert torch.equal(layer.storage, before)
    assert layer.is_dense


@pytest.mark.parametrize(
    ("make", "larger"),
    [(lambda p: Adamax(p, lr=0.01), 1.5), (lambda p: RMSprop(p, lr=0.01, alpha=0.9, centered=True), 3.0)],
    ids=["adamax", "centred"],
)
@pytest.mark.parametrize("before", [0, 3])
def test_steps_stay_of_the_size_that_the_optimizer_makes(make: Make, larger: float, before: int) -> None:
    """Gradients that change little, so that their average is no smaller than the sizes that it is divided by."""
    layer = layer_of(before)
    optimizer = make([layer.storage])

    def largest_step(seed: int) -> float:
        noise, was = 0.3 * gradient(layer, seed), layer.storage.detach().clone()
        gradient(layer, 0)
        assert layer.storage.grad is not None
        layer.storage.grad += noise
        optimizer.step()
        return float((layer.storage.detach() - was).abs().max())

    usual = max([largest_step(seed) for seed in range(60)][-10:])
    reform_(layer, *truncated(layer, 2), [optimizer])
    assert 0 < largest_step(60) <= larger * usual


@pytest.mark.parametrize("rank", [0, 3])
def test_a_copy_that_is_equal_stays_so_and_any_other_keeps_what_it_can(rank: int) -> None:
    layer, copy = layer_of(rank), layer_of(rank)
    before = layer.product().detach()
    left, right = matrix(6, 2, seed=8), matrix(2, 8, seed=9)  # any factors: a metric chooses them
    follow_(copy, left, right, before)
    torch.testing.assert_close(copy.product(), left @ right)
    other = layer_of(0)
    other.storage.data.copy_(before + 0.1 * matrix(6, 8, seed=7))
    follow_(other, left, right, before)
    own_left, own_right = (factor.detach() for factor in other.factors())
    assert torch.equal(own_left, left)
    rest = 0.1 * matrix(6, 8, seed=7) - left @ (own_right - right)
    assert float((left.T @ rest).abs().max()) < 1e-12
