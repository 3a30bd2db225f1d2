"""n = 5 inputs, m = 4 outputs, rank 3 unless a test says otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_pl.core import Factors, truncated_svd
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.nn import LowRankLinear, PivotedLinear, final_form, in_two_factors, restated
from tests.core.matrices import random_matrix


def two_factors(bias: bool = True, n: int = 5, m: int = 4, rank: int = 3) -> LowRankLinear:
    layer = LowRankLinear(n, m, rank, bias)
    layer.assign_(truncated_svd(random_matrix(m, n), rank))
    if layer.bias is not None:
        layer.bias.data.copy_(random_matrix(m, seed=1))
    return layer


def pivoted(bias: bool = True, rank: int = 3) -> PivotedLinear:
    made = restated(two_factors(bias, rank=rank), PivotedLinear)
    assert isinstance(made, PivotedLinear)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_the_function_is_that_of_two_factors(bias: bool, rank: int) -> None:
    before, after, x = two_factors(bias, rank=rank), pivoted(bias, rank), random_matrix(2, 3, 5, seed=2)
    torch.testing.assert_close(after(x), before(x))
    torch.testing.assert_close(after(x), F.linear(x, after.product(), after.bias))
    torch.testing.assert_close(after.weight + 0, before.product())
    assert after.weight.shape == (4, 5)
    assert after(x).shape == (2, 3, 4)
    assert sum(p.numel() for p in after.parameters()) == rank * (4 + 5 - rank) + 4 * bias
    linears = [module for module in after.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == (2 if rank < 4 else 1)  # an empty one would stop tools that look for them


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_the_way_back_to_two_factors(bias: bool, rank: int) -> None:
    before, x = pivoted(bias, rank).eval(), random_matrix(2, 5)
    after = in_two_factors(before)
    assert isinstance(after, LowRankLinear)
    assert (after.rank, after.training) == (rank, False)
    torch.testing.assert_close(after(x), before(x))
    assert in_two_factors(after) is after


def test_many_tokens_are_computed_the_other_way_alike() -> None:
    layer, few, many = pivoted(), random_matrix(3, 5, seed=2), random_matrix(4, 5, seed=2)
    torch.testing.assert_close(layer(many), F.linear(many, layer.product(), layer.bias))
    assert layer.others is not None
    seen: list[int] = []
    handle = layer.others.register_forward_hook(lambda _, args, output: seen.append(len(args[0])))
    torch.testing.assert_close(layer(many), F.linear(many, layer.product(), layer.bias))
    layer(few)
    assert seen == [4, 3]  # whoever looks at the linear sees it called
    handle.remove()


def test_gradients_are_those_of_the_product() -> None:
    layer, x = pivoted().double(), random_matrix(7, 5, seed=3).double()
    assert layer.others is not None
    assert layer.bias is not None
    parameters: list[torch.Tensor] = [layer.pivots.weight, layer.others.weight, layer.bias]
    own = torch.autograd.grad(layer(x).square().sum(), parameters)
    through = torch.autograd.grad(F.linear(x, layer.product(), layer.bias).square().sum(), parameters)
    for one, other in zip(own, through, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_and_autocast_keep_their_dtype(dtype: torch.dtype) -> None:
    layer, x = pivoted(), random_matrix(6, 5, seed=2)
    half = copy.deepcopy(layer).to(dtype)
    assert half.order.dtype == torch.int32
    assert half(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(half(x.to(dtype)).float(), layer(x), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_compiled_it_computes_the_same_and_state_survives_a_round_trip() -> None:
    layer, x = pivoted(), random_matrix(6, 5, seed=2)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    other = PivotedLinear(5, 4, 3)
    assert torch.equal(other(x), torch.zeros(6, 4))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_an_average_with_the_rows_of_another_layer_means_something() -> None:
    layer, near = pivoted(), two_factors()
    near.left.weight.data += 0.01 * random_matrix(4, 3, seed=5)
    copy_of = restated(near, PivotedLinear, like=layer)
    assert isinstance(copy_of, PivotedLinear)
    assert torch.equal(copy_of.order, layer.order)
    torch.testing.assert_close(copy_of.product(), near.product())


def test_layers_of_zeros_and_of_a_lower_rank_are_written() -> None:
    layer = PivotedLinear(5, 4, 3)
    layer.assign_(Factors(torch.zeros(4, 3), torch.zeros(3), torch.zeros(3, 5)))
    assert not layer.product().any()
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", ["elastic", "Pivoted", "woven"])
def test_only_final_forms_are_named(name: str) -> None:
    assert final_form("pivoted") is PivotedLinear
    with pytest.raises(RangeError, match=rf"form='{name}' is out of range: allowed is 'low_rank' or 'pivoted'"):
        final_form(name)
