"""Conversions of factorised layers back to dense ones."""

from __future__ import annotations

import torch
from torch import nn

from lowrank_pl.nn import LowRankLinear
from lowrank_pl.surgery.swap import replace_module_


def empty_linear_like(layer: LowRankLinear) -> nn.Linear:
    """An `nn.Linear` of the same features, bias, device, dtype and mode; only the bias has its values."""
    linear = nn.Linear(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        device=layer.left.device,
        dtype=layer.left.dtype,
    )
    if layer.bias is not None:
        linear.bias.data.copy_(layer.bias.data)
    return linear.train(layer.training)


@torch.no_grad()
def densify_(model: nn.Module) -> nn.Module:
    """Multiplies every factorised layer of a model back to an `nn.Linear`, in place; returns the model."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LowRankLinear):
            linear = empty_linear_like(layer)
            linear.weight.copy_(layer.product())
            replace_module_(model, name, linear)
    return model
