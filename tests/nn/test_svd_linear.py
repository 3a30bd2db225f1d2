"""n = 8 inputs, m = 6 outputs, capacity 6 unless a test says otherwise.

At rank 6 the product is cheaper from 9 tokens on: 84 t multiplications against 48 t + 288.
"""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pl.core import Factors, LinearShape, singular_values
from lowrank_pl.errors.numerics import NonFiniteError, RankError
from lowrank_pl.nn import SVDLinear
from tests.core.matrices import random_matrix

FEW, MANY = 5, 12  # tokens: factor by factor, and by the product


def filled(
    capacity: int = 6, rank: int | None = None, bias: bool = True, dtype: torch.dtype = torch.float64
) -> SVDLinear:
    """Random parts, as far from orthonormal as training may leave them; the groups that do not count are not zero."""
    layer = SVDLinear(8, 6, capacity, bias, dtype=dtype)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(random_matrix(*parameter.shape, seed=seed, dtype=dtype))
    layer.rank = capacity if rank is None else rank
    return layer


def dense(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(8, 6, bias, dtype=dtype)
    for seed, parameter in enumerate(linear.parameters()):
        parameter.data.copy_(random_matrix(*parameter.shape, seed=seed, dtype=dtype))
    return linear


def gradients(layer: SVDLinear) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert None not in found.values()
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def multiplications(layer: nn.Module, tokens: int) -> int:
    dtype = next(layer.parameters()).dtype
    with FlopCounterMode(display=False) as counter:
        layer(random_matrix(tokens, 8, dtype=dtype))
    flops: int = counter.get_total_flops()
    return flops // 2  # one multiplication is counted with its addition


def test_code_that_asks_for_the_weight_gets_the_product() -> None:
    layer = filled(rank=3, bias=False)
    assert (layer.weight.dtype, tuple(layer.weight.shape)) == (torch.float64, (6, 8))
    torch.testing.assert_close(layer.weight.detach(), layer.product().detach())
    layer.weight.square().sum().backward()
    assert all(bool(gradient.any()) for gradient in gradients(layer).values())


def test_a_block_that_computes_with_the_weights_of_its_layers_is_scored() -> None:
    """torch's own does in eval mode."""
    block = nn.TransformerEncoderLayer(8, 2, 6, batch_first=True).eval()
    x = random_matrix(4, 8, dtype=torch.float32).unsqueeze(0)
    with torch.no_grad():
        before = block(x)
        block.linear1 = SVDLinear.from_linear(block.linear1)  # type: ignore[assignment]
        torch.testing.assert_close(block(x), before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("bias", [True, False])
def test_at_full_capacity_it_computes_what_the_dense_layer_computes(
    dtype: torch.dtype, tolerance: float, tokens: int, bias: bool
) -> None:
    linear, x = dense(bias, dtype), random_matrix(tokens, 8, seed=2, dtype=dtype)
    layer = SVDLinear.from_linear(linear)
    assert (layer.capacity, layer.rank) == (6, 6)
    torch.testing.assert_close(layer.product(), linear.weight.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer(x), linear(x), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("capacity", [1, 3, 5])
def test_a_smaller_capacity_keeps_the_largest_groups(capacity: int) -> None:
    linear = dense(dtype=torch.float64)
    layer = SVDLinear.from_linear(linear, capacity)
    spectrum = singular_values(linear.weight.detach())
    torch.testing.assert_close(layer.sigma.detach(), spectrum[:capacity])
    error = torch.linalg.norm(linear.weight.detach() - layer.product()) ** 2
    torch.testing.assert_close(error.detach(), (spectrum[capacity:] ** 2).sum())


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (3, 5), (0,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_forward_is_the_sum_of_the_groups_that_count(leading: tuple[int, ...], bias: bool, rank: int) -> None:
    layer, x = filled(rank=rank, bias=bias), random_matrix(*leading, 8, seed=9, dtype=torch.float64)
    expected = torch.zeros(*leading, 6, dtype=torch.float64)
    for k in range(rank):
        expected = expected + (x @ layer.right[k])[..., None] * layer.sigma[k] * layer.left[:, k]
    torch.testing.assert_close(layer(x), expected + (layer.bias if layer.bias is not None else 0.0))
    torch.testing.assert_close(layer(x), F.linear(x, layer.product(), layer.bias))


@pytest.mark.parametrize("rank", [4, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_both_orders_give_the_same_outputs_and_gradients(rank: int, bias: bool) -> None:
    tokens = 40  # together by the product, one at a time factor by factor
    whole, single = filled(rank=rank, bias=bias), filled(rank=rank, bias=bias)
    assert multiplications(whole, tokens) == rank * 48 + tokens * 48
    assert multiplications(single, 1) == rank * 14
    x, g = (random_matrix(tokens, size, seed=size, dtype=torch.float64) for size in (8, 6))
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    by_product = whole(first)
    by_factors = torch.cat([single(token) for token in second.split(1)])
    torch.testing.assert_close(by_product, by_factors)
    by_product.backward(g)
    by_factors.backward(g)
    assert set(gradients(whole)) == {"left", "sigma", "right"} | ({"bias"} if bias else set())
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradient, gradients(single)[name], msg=name)
    torch.testing.assert_close(first.grad, second.grad)


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_numerical_gradients_of_everything(tokens: int) -> None:
    layer = filled()
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["left", "sigma", "right", "bias"]

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        output: Tensor = functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return output

    values = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    x = random_matrix(tokens, 8, seed=7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, *values))


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
@pytest.mark.parametrize("tokens", [1, 8, 9, 24, 25, 300])
def test_a_forward_costs_the_cheaper_of_both_orders(rank: int, tokens: int) -> None:
    thin, product = tokens * rank * (6 + 8), 6 * 8 * (rank + tokens)
    assert multiplications(filled(rank=rank), tokens) == min(thin, product)
    # Only at ranks above break-even (48 / 14) does the product ever pay.
    assert (product < thin) is (rank == 6 and tokens >= 9) | (rank == 4 and tokens >= 25)


@pytest.mark.parametrize("tokens", [FEW, 40])
@pytest.mark.parametrize("rank", [1, 3, 5, 6])
def test_a_prefix_equals_masking_the_dropped_groups(tokens: int, rank: int) -> None:
    prefix, masked = filled(rank=rank), filled()
    for tensor, dim in ((masked.left, 1), (masked.sigma, 0), (masked.right, 0)):
        tensor.data.narrow(dim, rank, 6 - rank).zero_()
    x, g = (random_matrix(tokens, size, seed=size, dtype=torch.float64) for size in (8, 6))
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(prefix(first), masked(second))
    prefix(first).backward(g)
    masked(second).backward(g)
    for name, gradient in gradients(prefix).items():
        torch.testing.assert_close(gradient, gradients(masked)[name], msg=name)
    torch.testing.assert_close(first.grad, second.grad)


@pytest.mark.parametrize("tokens", [FEW, 40])
@pytest.mark.parametrize("rank", [1, 4, 5])
def test_groups_that_do_not_count_have_gradients_of_exactly_zero(tokens: int, rank: int) -> None:
    layer = filled(rank=rank)
    layer(random_matrix(tokens, 8, dtype=torch.float64)).square().sum().backward()
    found = gradients(layer)
    for gradient in (found["left"].mT, found["sigma"], found["right"]):
        assert gradient.shape[0] == 6
        assert torch.count_nonzero(gradient[rank:]) == 0
        assert torch.count_nonzero(gradient[:rank]) == gradient[:rank].numel()


def test_groups_that_do_not_count_change_nothing_even_if_they_are_nan() -> None:
    layer, x = filled(rank=3), random_matrix(FEW, 8, dtype=torch.float64)
    before = layer(x)
    layer.left.data[:, 3:] = layer.sigma.data[3:] = layer.right.data[3:] = torch.nan
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.factors().product().isfinite(), torch.ones(6, 8, dtype=torch.bool))


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_a_rank_below_capacity_costs_what_a_layer_of_that_capacity_costs(tokens: int) -> None:
    for rank in (1, 3, 5):
        assert multiplications(filled(6, rank), tokens) == multiplications(filled(rank), tokens)


def test_two_call_sites_add_their_gradients() -> None:
    both, first, second = filled(), filled(), filled()
    few, many = (random_matrix(tokens, 8, seed=tokens, dtype=torch.float64) for tokens in (FEW, MANY))
    # One call in each of the two orders, in one graph.
    (both(few).square().sum() + both(many).square().sum()).backward()
    first(few).square().sum().backward()
    second(many).square().sum().backward()
    for name, gradient in gradients(both).items():
        torch.testing.assert_close(gradient, gradients(first)[name] + gradients(second)[name], msg=name)


def test_a_shared_layer_trains_like_the_shared_dense_one() -> None:
    linear = nn.Linear(6, 6, dtype=torch.float64)
    linear.weight.data.copy_(random_matrix(6, 6, dtype=torch.float64))
    layer, x = SVDLinear.from_linear(linear), random_matrix(3, 6, seed=1, dtype=torch.float64)
    nn.Sequential(linear, nn.Tanh(), linear)(x).square().sum().backward()
    nn.Sequential(layer, nn.Tanh(), layer)(x).square().sum().backward()
    assert linear.weight.grad is not None
    # ∂L/∂σ_k = left_kᵀ G right_kᵀ, where G is the gradient of the dense weight.
    expected = torch.einsum("mk,mn,kn->k", layer.left, linear.weight.grad, layer.right)
    torch.testing.assert_close(gradients(layer)["sigma"], expected.detach())
    torch.testing.assert_close(gradients(layer)["bias"], linear.bias.grad)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_factors_are_the_product_of_the_groups_that_count_in_singular_form(rank: int) -> None:
    layer = filled(rank=rank)
    factors = layer.factors()
    assert isinstance(factors, Factors)
    assert factors.rank == rank
    torch.testing.assert_close(factors.product(), layer.product().detach())
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(factors.left.mT @ factors.left, identity)
    torch.testing.assert_close(factors.right @ factors.right.mT, identity)
    torch.testing.assert_close(factors.sigma, singular_values(layer.product().detach())[:rank])
    assert not factors.left.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_come_in_the_dtype_of_the_layer(dtype: torch.dtype) -> None:
    factors = filled(rank=3, dtype=dtype).factors()
    assert {factors.left.dtype, factors.sigma.dtype, factors.right.dtype} == {dtype}


def test_setting_the_rank_touches_no_parameter() -> None:
    layer = filled()
    before = {name: (id(p), p.data_ptr(), p.detach().clone()) for name, p in layer.named_parameters()}
    layer.rank = 2
    assert (layer.rank, int(layer.active), layer.capacity) == (2, 2, 6)
    for name, parameter in layer.named_parameters():
        identity, place, value = before[name]
        assert (id(parameter), parameter.data_ptr()) == (identity, place)
        assert torch.equal(parameter, value)
    layer.rank = 6
    torch.testing.assert_close(layer.product(), filled().product())


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_an_impossible_rank_is_refused_and_changes_nothing(rank: int) -> None:
    layer = filled(rank=4)
    with pytest.raises(RankError, match=rf"rank {rank} is impossible.*= 6"):
        layer.rank = rank
    assert (layer.rank, int(layer.active)) == (4, 4)


def test_the_rank_may_not_exceed_the_capacity() -> None:
    layer = filled(3)
    with pytest.raises(RankError, match=r"rank 4 is impossible.*= 3"):
        layer.rank = 4


@pytest.mark.parametrize("capacity", [0, 7])
def test_an_impossible_capacity_is_refused(capacity: int) -> None:
    with pytest.raises(RankError, match=rf"rank {capacity} is impossible.*= 6"):
        SVDLinear(8, 6, capacity)
    with pytest.raises(RankError, match=rf"rank {capacity} is impossible.*= 6"):
        SVDLinear.from_linear(dense(), capacity)


def test_a_non_finite_weight_is_refused() -> None:
    linear = dense()
    linear.weight.data[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="weight contains 1 NaN or Inf"):
        SVDLinear.from_linear(linear)


@pytest.mark.parametrize("assign", [False, True])
def test_the_rank_travels_in_the_state_dict(assign: bool) -> None:
    layer, x = filled(rank=4), random_matrix(FEW, 8, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(nn.Sequential(layer).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == {"0.left", "0.sigma", "0.right", "0.bias", "0.active"}
    fresh = SVDLinear(8, 6, 6, dtype=torch.float64)
    nn.Sequential(fresh).load_state_dict(state, assign=assign)
    assert (fresh.rank, int(fresh.active)) == (4, 4)
    assert torch.equal(fresh(x), layer(x))
    fresh.rank = 2
    assert int(fresh.active) == 2
    assert (layer.rank, int(layer.active)) == (4, 4)


def test_a_copy_has_its_own_rank() -> None:
    layer, x = filled(rank=4), random_matrix(FEW, 8, dtype=torch.float64)
    other = copy.deepcopy(layer)
    assert (other.rank, int(other.active)) == (4, 4)
    assert torch.equal(other(x), layer(x))
    other.rank = 2
    assert (layer.rank, int(layer.active)) == (4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_dtype_leaves_the_rank_alone(dtype: torch.dtype) -> None:
    layer = filled(rank=5)
    for moved in (copy.deepcopy(layer).to(dtype), copy.deepcopy(layer).to(torch.device("cpu"), dtype)):
        assert (moved.rank, int(moved.active)) == (5, 5)
        assert not moved.active.is_floating_point()
        assert {parameter.dtype for parameter in moved.parameters()} == {dtype}
        assert moved(random_matrix(FEW, 8, dtype=dtype)).dtype is dtype


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_runs_under_bfloat16_autocast(tokens: int) -> None:
    layer, x = filled(dtype=torch.float32), random_matrix(tokens, 8, seed=9)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    exact = layer(x).detach()
    assert float((y.detach() - exact).abs().max()) < 0.05 * float(exact.abs().max())
    y.float().square().sum().backward()
    assert {gradient.dtype for gradient in gradients(layer).values()} == {torch.float32}
    reference = filled(dtype=torch.float32)
    reference(x).square().sum().backward()
    for name, gradient in gradients(layer).items():
        expected = gradients(reference)[name]
        assert float((gradient - expected).abs().max()) < 0.05 * float(expected.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_like_keeps_features_dtype_bias_and_mode(dtype: torch.dtype, bias: bool, training: bool) -> None:
    linear = dense(bias, dtype).train(training)
    layer = SVDLinear.like(linear, 4)
    assert (layer.in_features, layer.out_features, layer.capacity, layer.rank) == (8, 6, 4, 4)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer.training is training
    if bias:
        assert layer.bias is not None
        assert torch.equal(layer.bias, linear.bias)
        assert layer.bias.data_ptr() != linear.bias.data_ptr()
    else:
        assert layer.bias is None
    assert SVDLinear.like(layer, 3).capacity == 3  # the same from a layer in groups
    assert set(layer.state_dict()) == {"left", "sigma", "right", "active"} | ({"bias"} if bias else set())


def test_like_keeps_the_device() -> None:
    layer = SVDLinear.like(nn.Linear(8, 6, device="meta"), 2)
    assert {tensor.device.type for tensor in (*layer.parameters(), layer.active)} == {"meta"}


def test_a_fresh_layer_is_zero_so_that_a_forgotten_fill_shows() -> None:
    assert torch.equal(SVDLinear(8, 6, 3)(torch.ones(2, 8)), torch.zeros(2, 6))


def test_from_linear_leaves_trainable_leaves_and_the_linear_alone() -> None:
    linear = dense()
    before = linear.weight.detach().clone()
    layer = SVDLinear.from_linear(linear)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in layer.parameters())
    layer.left.data.zero_()
    assert torch.equal(linear.weight, before)


def test_shape_is_that_of_the_dense_weight() -> None:
    assert filled(rank=2).shape == LinearShape(6, 8)


def test_print_shows_rank_and_capacity() -> None:
    layer = filled(5, 3, bias=False)
    assert repr(layer) == "SVDLinear(in_features=8, out_features=6, rank=3, capacity=5, bias=False)"
