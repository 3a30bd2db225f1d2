"""Dense layers seen alike, whichever way round their class stores the weight. m: outputs, n: inputs.

A look-up in a matrix `E [v, d]` is a linear layer of one-hot inputs with the weight `Eᵀ`: `m = d`, `n = v`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.core.shapes import EmbeddingShape, LinearShape


def is_dense_linear(module: nn.Module) -> bool:
    """Whether a module is a dense layer `y = W x + bias` that a form can stand for.

    These are `nn.Linear` and transformers' `Conv1D` themselves. Subclasses have a forward of their own, which a form
    would not reproduce.
    """
    return type(module) is nn.Linear or is_transposed(type(module))


def is_embedding(module: nn.Module) -> bool:
    """Whether a module is a plain look-up that a form can stand for; subclasses have a forward of their own."""
    return type(module) is nn.Embedding


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a dense layer as `[m, n]`: the parameter itself, or a view of it that shares its memory."""
    weight: Any = layer.weight
    found: Tensor = weight.mT if is_transposed(type(layer)) or is_embedding(layer) else weight
    return found


def dense_shape(layer: nn.Module) -> LinearShape:
    """The shape of a dense layer's weight."""
    kind = EmbeddingShape if is_embedding(layer) else LinearShape
    return kind(*dense_weight(layer).shape)


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a call of a linear layer, as hooks see it: `layer(x)`, or by whatever keyword its class names it."""
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def empty_dense(
    kind: type[nn.Module],
    shape: LinearShape,
    bias: bool,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A dense layer of one of these classes, filled with zeros; no random numbers are drawn.

    Args:
        kind: `nn.Linear` or transformers' `Conv1D`.
        shape: Of its weight.
        bias: Whether it has a bias; a `Conv1D` always has one.
        device: Of its parameters; the default one if `None`.
        dtype: Of its parameters; the default one if `None`.
    """
    m, n = shape.out_features, shape.in_features
    if not is_transposed(kind):
        return zero_linear(n, m, bias, device, dtype)
    with torch.device("meta"):
        layer = kind(m, n)
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(torch.zeros(parameter.shape, device=device, dtype=dtype)))
    return layer


class _ZeroLinear(nn.Linear):
    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            parameter.zero_()  # not nn.init.zeros_, which transformers turns off while it builds a model


def zero_linear(
    in_features: int,
    out_features: int,
    bias: bool,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Linear:
    """An `nn.Linear` of zeros; no random numbers are drawn, which would take longer than all the rest."""
    layer: nn.Linear = _ZeroLinear(in_features, out_features, bias, device, dtype)
    layer.__class__ = nn.Linear
    return layer


def is_transposed(kind: type[nn.Module]) -> bool:
    """Whether a class of dense layers stores its weight as `[n, m]`."""
    # GPT-2's layer, `[n, m]`. Whoever has one has imported its module, and nobody else should have to.
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and kind is module.Conv1D
