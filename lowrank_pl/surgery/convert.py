"""Conversions between the forms of a layer: dense, two factors of exact rank, singular groups in training."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lowrank_pl.core import Factors
from lowrank_pl.nn import LowRankLinear, SVDLinear
from lowrank_pl.surgery.swap import replace_module_


def empty_linear_like(layer: LowRankLinear | SVDLinear) -> nn.Linear:
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
        if isinstance(layer, (LowRankLinear, SVDLinear)):
            _densify_one(model, name, layer)
    return model


@torch.no_grad()
def compact_(model: nn.Module, dense: Collection[str] = ()) -> nn.Module:
    """Turns every `SVDLinear` of a model into a `LowRankLinear` of its rank, in place; returns the model.

    Parameters are new objects: no optimizer may need them afterwards.

    Args:
        model: The model.
        dense: Names of layers that become an `nn.Linear` instead.
    """
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, SVDLinear):
            continue
        if name in dense:
            _densify_one(model, name, layer)
        else:
            compact = LowRankLinear.like(layer, layer.rank)
            compact.assign_(layer.factors())
            replace_module_(model, name, compact)
    return model


def compact_state(state: Mapping[str, Tensor], dense: Collection[str] = ()) -> dict[str, Tensor]:
    """What `compact_` would make of a state dict: the same entries but for layers in singular groups.

    Args:
        state: Of a model, names as in the model.
        dense: Names of layers that become dense.
    """
    layers = [name.removesuffix(".sigma") for name in state if name.endswith(".sigma")]
    layers = [layer for layer in layers if f"{layer}.active" in state]
    # A layer with several names shares its tensors, also after a checkpoint has been read.
    places = {state[f"{layer}.left"].data_ptr() for layer in layers if layer in dense}
    dense = [layer for layer in layers if state[f"{layer}.left"].data_ptr() in places]
    found = dict(state)
    for layer in layers:
        rank = int(found.pop(f"{layer}.active"))
        left, sigma, right = (found.pop(f"{layer}.{part}") for part in ("left", "sigma", "right"))
        a, b = (left[:, :rank] * sigma[:rank]), right[:rank]
        if layer in dense:
            found[f"{layer}.weight"] = a @ b
        else:
            a, b = Factors.from_product(a.double(), b.double()).to(left.dtype).balanced()
            found |= {f"{layer}.left": a, f"{layer}.right": b}
    return found


def _densify_one(model: nn.Module, name: str, layer: LowRankLinear | SVDLinear) -> None:
    linear = empty_linear_like(layer)
    linear.weight.copy_(layer.product())
    replace_module_(model, name, linear)
