import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lowrank_pl.core import singular_values
from lowrank_pl.nn import LowRankLinear, SVDLinear
from lowrank_pl.surgery import ModelLayout, compact_, compact_state, densify_, read_layout, svd_layers
from tests.core.matrices import random_matrix
from tests.support.tiny import FAMILIES
from tests.surgery.encoders import in_groups_, logits, padded_batch, tiny_model
from tests.surgery.test_layout import factorise_, low_rank


def trained(rank: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> SVDLinear:
    """n = 5 inputs, m = 4 outputs; also the groups that do not count are filled."""
    layer = SVDLinear(5, 4, 4, bias, dtype=dtype)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(random_matrix(*parameter.shape, seed=seed, dtype=dtype))
    layer.rank = rank
    return layer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("factorise", [lambda model: factorise_(model, 4), in_groups_], ids=["low_rank", "groups"])
def test_densified_model_gives_the_outputs_and_keys_of_a_dense_one(
    family: str, factorise: Callable[[nn.Module], nn.Module]
) -> None:
    model, batch = factorise(tiny_model(family)), padded_batch()
    before = logits(model, batch)
    assert densify_(model) is model
    assert read_layout(model) == ModelLayout({})
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-5)
    assert list(model.state_dict()) == list(tiny_model(family).state_dict())


def test_densified_weights_are_the_products_and_train() -> None:
    layer = LowRankLinear(5, 4, 2)
    layer.left.weight.data.copy_(random_matrix(4, 2))
    layer.right.weight.data.copy_(random_matrix(2, 5, seed=1))
    product = layer.product().detach()
    dense = densify_(nn.Sequential(layer)).get_submodule("0")
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight.detach(), product)
    assert dense.weight.requires_grad
    assert dense.weight.is_leaf


def test_a_densified_layer_in_groups_has_those_that_count() -> None:
    layer = trained(rank=2)
    product = layer.product().detach()
    assert torch.linalg.matrix_rank(product) == 2
    dense = densify_(nn.Sequential(layer)).get_submodule("0")
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight.detach(), product)
    assert layer.bias is not None
    assert torch.equal(dense.bias, layer.bias)


def test_a_shared_layer_stays_shared() -> None:
    shared = LowRankLinear(4, 4, 2)
    root = densify_(nn.Sequential(shared, nn.Tanh(), shared))
    first, last = root.get_submodule("0"), root.get_submodule("2")
    assert first is last
    assert type(first) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_empty_linear_keeps_features_dtype_bias_and_mode(dtype: torch.dtype, bias: bool, training: bool) -> None:
    layer = LowRankLinear(5, 4, 2, bias, dtype=dtype).train(training)
    if layer.bias is not None:
        layer.bias.data.copy_(random_matrix(4, dtype=dtype))
    dense = layer.empty_dense()
    assert isinstance(dense, nn.Linear)
    assert (dense.in_features, dense.out_features, dense.training) == (5, 4, training)
    assert dense.weight.dtype is dtype
    assert (dense.bias is not None) is bias
    if layer.bias is not None:
        assert torch.equal(dense.bias, layer.bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compacted_model_gives_the_same_outputs_at_exact_ranks(family: str) -> None:
    model, batch = in_groups_(tiny_model(family)), padded_batch()
    before, ranks = logits(model, batch), {name: layer.rank for name, layer in svd_layers(model).items()}
    assert len(set(ranks.values())) > 1
    assert compact_(model) is model
    assert read_layout(model) == ModelLayout({name: low_rank(rank) for name, rank in ranks.items()})
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "albert", "deberta-v2"])
@pytest.mark.parametrize("every", [0, 1, 3], ids=["none_dense", "all_dense", "some_dense"])
def test_a_compacted_state_is_the_state_of_the_compacted_model(family: str, every: int) -> None:
    model = in_groups_(tiny_model(family))
    dense = list(svd_layers(model))[::every] if every else []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, _ = compact_state(model.state_dict(), read_layout(model), dense)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected = compact_(copy.deepcopy(model), dense).state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_compact_factors_are_balanced_and_their_product_is_the_same(dtype: torch.dtype, bias: bool, rank: int) -> None:
    layer = trained(rank, bias, dtype).eval()
    product = layer.product().detach()
    compact = compact_(nn.Sequential(layer)).get_submodule("0")
    assert isinstance(compact, LowRankLinear)
    assert (compact.rank, compact.training, compact.left.weight.dtype) == (rank, False, dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(compact.product().detach(), product, rtol=tolerance, atol=tolerance)
    norms = [
        torch.linalg.norm(compact.left.weight.double(), dim=0),
        torch.linalg.norm(compact.right.weight.double(), dim=1),
    ]
    torch.testing.assert_close(norms[0] ** 2, singular_values(product)[:rank], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(norms[0], norms[1], rtol=tolerance, atol=tolerance)
    if layer.bias is None:
        assert compact.bias is None
    else:
        assert compact.bias is not None
        assert torch.equal(compact.bias, layer.bias)


def test_compact_layers_named_dense_become_linears() -> None:
    untouched, last = nn.Linear(4, 5), trained(3)
    product = last.product().detach()
    root = nn.Sequential(trained(2), untouched, last)
    compact_(root, ["2"])
    assert isinstance(root[0], LowRankLinear)
    assert root[1] is untouched
    assert type(root[2]) is nn.Linear
    assert torch.equal(root[2].weight.detach(), product)
    assert read_layout(root) == ModelLayout({"0": low_rank(2)})


def test_a_compacted_model_trains() -> None:
    root = compact_(nn.Sequential(trained(2), nn.Linear(4, 5), trained(3)), ["2"])
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in root.parameters())
    root(random_matrix(3, 5, seed=9)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in root.parameters())


def test_a_shared_layer_stays_shared_when_compacted() -> None:
    shared = SVDLinear.from_linear(nn.Linear(4, 4), 3)
    tree = nn.Sequential(shared, nn.Tanh(), shared)
    state, _ = compact_state(tree.state_dict(), read_layout(tree))
    root = compact_(tree)
    first, last = root.get_submodule("0"), root.get_submodule("2")
    assert first is last
    assert isinstance(first, LowRankLinear)
    assert state.keys() == root.state_dict().keys()


def test_a_shared_layer_is_dense_under_all_its_names() -> None:
    shared = SVDLinear.from_linear(nn.Linear(4, 4), 3)
    root = nn.Sequential(shared, nn.Tanh(), shared)
    state, _ = compact_state(root.state_dict(), read_layout(root), ["0"])
    assert state.keys() == compact_(root, ["0"]).state_dict().keys()


def test_compacting_leaves_a_model_without_groups_alone() -> None:
    root = nn.Sequential(nn.Linear(4, 4), LowRankLinear(4, 4, 2))
    before = list(root)
    assert all(now is then for now, then in zip(compact_(root).children(), before, strict=True))
    state = root.state_dict()
    assert compact_state(state, read_layout(root)) == (state, read_layout(root))


def test_an_empty_linear_stands_for_a_layer_in_groups_too() -> None:
    layer = trained(2, dtype=torch.float64).eval()
    dense = layer.empty_dense()
    assert isinstance(dense, nn.Linear)
    assert (dense.in_features, dense.out_features, dense.training, dense.weight.dtype) == (5, 4, False, torch.float64)
    assert layer.bias is not None
    assert torch.equal(dense.bias, layer.bias)
