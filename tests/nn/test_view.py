"""Dense layers seen as `[m, n]`. n = 5 inputs, m = 4 outputs."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lowrank_pl.core import LinearShape
from lowrank_pl.nn import LowRankLinear, dense_shape, dense_weight, is_dense_linear
from lowrank_pl.nn.view import empty_dense
from tests.core.matrices import random_matrix


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), Conv1D(4, 5)])
def test_the_weight_is_outputs_by_inputs_and_shares_memory(layer: nn.Module) -> None:
    assert is_dense_linear(layer)
    assert dense_shape(layer) == LinearShape(4, 5)
    with torch.no_grad():
        dense_weight(layer).copy_(random_matrix(4, 5))
        layer.get_parameter("bias").copy_(random_matrix(4, seed=1))
    x = random_matrix(2, 3, 5, seed=2)
    torch.testing.assert_close(layer(x), F.linear(x, random_matrix(4, 5), random_matrix(4, seed=1)))


def test_subclasses_and_others_are_no_dense_linears() -> None:
    class Scaled(nn.Linear):
        pass

    class Turned(Conv1D):
        pass

    kind: Any = Turned

    others: list[nn.Module] = [
        Scaled(5, 4),
        kind(4, 5),
        nn.Conv1d(5, 4, 1),
        nn.Bilinear(2, 2, 2),
        LowRankLinear(5, 4, 2),
    ]
    assert not any(is_dense_linear(module) for module in others)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_empty_layer_is_of_the_class_and_zero(kind: type[nn.Module], dtype: torch.dtype | None) -> None:
    made = empty_dense(kind, LinearShape(4, 5), True, torch.device("cpu"), dtype)
    assert type(made) is kind
    assert dense_shape(made) == LinearShape(4, 5)
    assert {p.dtype for p in made.parameters()} == {dtype or torch.float32}
    assert not any(p.any() for p in made.parameters())
    assert all(p.requires_grad for p in made.parameters())
