"""n = 5 inputs, m = 4 outputs, rank 3 unless a test says otherwise."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_pl.core import Factors, LinearShape, truncated_svd
from lowrank_pl.errors.numerics import RankError, ShapeError
from lowrank_pl.nn import LowRankLinear
from tests.core.matrices import random_matrix


def filled(bias: bool = True) -> LowRankLinear:
    layer = LowRankLinear(5, 4, 3, bias)
    layer.assign_(truncated_svd(random_matrix(4, 5), 3))
    if layer.bias is not None:
        layer.bias.data.copy_(random_matrix(4, seed=1))
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_forward_is_the_product_and_the_bias(bias: bool, leading: tuple[int, ...]) -> None:
    layer, x = filled(bias), random_matrix(*leading, 5, seed=2)
    expected = x @ (layer.left.weight @ layer.right.weight).mT + (layer.bias if layer.bias is not None else 0.0)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x), F.linear(x, layer.product(), layer.bias))
    assert layer(x).shape == (*leading, 4)


def test_full_rank_computes_what_the_dense_layer_computes() -> None:
    dense = nn.Linear(5, 4)
    with torch.no_grad():
        dense.weight.copy_(random_matrix(4, 5))
        dense.bias.copy_(random_matrix(4, seed=1))
    layer = LowRankLinear.like(dense, 4)
    layer.assign_(truncated_svd(dense.weight, 4))
    x = random_matrix(6, 5, seed=2)
    torch.testing.assert_close(layer.product(), dense.weight.detach(), check_dtype=True)
    torch.testing.assert_close(layer(x), dense(x))


def test_assign_keeps_the_parameter_objects_and_writes_balanced_factors() -> None:
    layer = LowRankLinear(5, 4, 3)
    before = [id(parameter) for parameter in layer.parameters()]
    factors = truncated_svd(random_matrix(4, 5), 3)
    layer.assign_(factors)
    assert [id(parameter) for parameter in layer.parameters()] == before
    torch.testing.assert_close(layer.product().detach(), factors.product())
    torch.testing.assert_close(
        torch.linalg.norm(layer.left.weight, dim=0), torch.linalg.norm(layer.right.weight, dim=1)
    )
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())


def test_assign_copies_so_that_later_changes_of_the_factors_do_not_reach_the_layer() -> None:
    factors = truncated_svd(random_matrix(4, 5), 3)
    layer = LowRankLinear(5, 4, 3)
    layer.assign_(factors)
    before = layer.product().detach().clone()
    factors.left.zero_()
    assert torch.equal(layer.product().detach(), before)


def test_a_fresh_layer_is_zero_so_that_a_forgotten_fill_shows() -> None:
    assert torch.equal(LowRankLinear(5, 4, 3)(torch.ones(2, 5)), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_like_keeps_features_dtype_bias_and_mode(dtype: torch.dtype, bias: bool, training: bool) -> None:
    dense = nn.Linear(5, 4, bias, dtype=dtype).train(training)
    layer = LowRankLinear.like(dense, 2)
    assert (layer.in_features, layer.out_features, layer.rank) == (5, 4, 2)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer.training is training
    if bias:
        assert layer.bias is not None
        assert torch.equal(layer.bias, dense.bias)
        assert layer.bias.data_ptr() != dense.bias.data_ptr()
    else:
        assert layer.bias is None
    assert LowRankLinear.like(layer, 3).rank == 3  # the same from a factorised layer
    assert set(layer.state_dict()) == {"left.weight", "right.weight"} | ({"left.bias"} if bias else set())


def test_like_keeps_the_device() -> None:
    layer = LowRankLinear.like(nn.Linear(5, 4, device="meta"), 2)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}


def test_gradients_are_those_of_the_product() -> None:
    layer, x, g = filled(), random_matrix(6, 5, seed=2), random_matrix(6, 4, seed=3)
    x.requires_grad_()
    layer(x).backward(g)
    dense_gradient = g.mT @ x.detach()
    assert layer.bias is not None
    assert layer.left.weight.grad is not None
    assert layer.right.weight.grad is not None
    assert layer.bias.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(layer.left.weight.grad, dense_gradient @ layer.right.weight.detach().mT)
    torch.testing.assert_close(layer.right.weight.grad, layer.left.weight.detach().mT @ dense_gradient)
    torch.testing.assert_close(layer.bias.grad, g.sum(0))
    torch.testing.assert_close(x.grad, g @ layer.product().detach())


def test_numerical_gradients() -> None:
    layer = filled().double()
    x = random_matrix(2, 5, seed=2, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda inputs: layer(inputs), (x,))


def test_state_dict_round_trip() -> None:
    layer, other = filled(), LowRankLinear(5, 4, 3)
    other.load_state_dict(layer.state_dict())
    x = random_matrix(2, 5, seed=2)
    assert torch.equal(layer(x), other(x))


def test_parameters_cost_what_the_shape_says() -> None:
    layer = LowRankLinear(5, 4, 3, bias=False)
    assert layer.shape == LinearShape(4, 5)
    assert sum(parameter.numel() for parameter in layer.parameters()) == layer.shape.factored_params(3) == 27


@pytest.mark.parametrize("rank", [0, 5])
def test_impossible_rank_is_refused(rank: int) -> None:
    with pytest.raises(RankError, match=rf"rank {rank} is impossible.*= 4"):
        LowRankLinear(5, 4, rank)


def test_assigning_another_rank_is_refused_and_changes_nothing() -> None:
    layer = filled()
    before = layer.product().detach().clone()
    with pytest.raises(ShapeError, match=r"factors\.left has shape \(4, 2\), expected \[4, 3\]"):
        layer.assign_(truncated_svd(random_matrix(4, 5, seed=9), 2))
    mixed = Factors(torch.ones(4, 3), torch.ones(3), torch.ones(3, 6))
    with pytest.raises(ShapeError, match=r"factors\.right has shape \(3, 6\), expected \[3, 5\]"):
        layer.assign_(mixed)
    assert torch.equal(layer.product().detach(), before)


def test_print_shows_rank_and_features() -> None:
    lines = [line.strip() for line in repr(LowRankLinear(5, 4, 3, bias=False)).splitlines()]
    assert lines[:2] == ["LowRankLinear(", "in_features=5, out_features=4, rank=3, bias=False"]
