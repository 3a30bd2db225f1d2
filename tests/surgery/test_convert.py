import pytest
import torch
from torch import nn

from lowrank_pl.nn import LowRankLinear
from lowrank_pl.surgery import ModelLayout, densify_, read_layout
from lowrank_pl.surgery.convert import empty_linear_like
from tests.core.matrices import random_matrix
from tests.support.tiny import FAMILIES
from tests.surgery.encoders import logits, padded_batch, tiny_model
from tests.surgery.test_layout import factorise_


@pytest.mark.parametrize("family", FAMILIES)
def test_densified_model_gives_the_outputs_and_keys_of_a_dense_one(family: str) -> None:
    model, batch = factorise_(tiny_model(family), 4), padded_batch()
    before = logits(model, batch)
    assert densify_(model) is model
    assert read_layout(model) == ModelLayout({})
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-5)
    assert list(model.state_dict()) == list(tiny_model(family).state_dict())


def test_densified_weights_are_the_products_and_train() -> None:
    layer = LowRankLinear(5, 4, 2)
    layer.left.data.copy_(random_matrix(4, 2))
    layer.right.data.copy_(random_matrix(2, 5, seed=1))
    product = layer.product().detach()
    dense = densify_(nn.Sequential(layer)).get_submodule("0")
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight.detach(), product)
    assert dense.weight.requires_grad
    assert dense.weight.is_leaf


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
    dense = empty_linear_like(layer)
    assert (dense.in_features, dense.out_features, dense.training) == (5, 4, training)
    assert dense.weight.dtype is dtype
    assert (dense.bias is not None) is bias
    if layer.bias is not None:
        assert torch.equal(dense.bias, layer.bias)
