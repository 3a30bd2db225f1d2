"""The last linear layer of a model: finding it by what it puts out, and changing its outputs. k: outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowrank_pl.errors.targets import HeadError


def find_head(model: nn.Module, forward: Callable[[], Tensor]) -> nn.Linear:
    """The linear layer whose outputs are the model's; of a head in two factors the left one, which has the bias.

    Args:
        model: The model.
        forward: Runs it once and returns its outputs `[…, k]`.

    Raises:
        HeadError: no linear layer with a bias puts them out.
    """
    seen: list[tuple[nn.Linear, Tensor]] = []

    def hook(module: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        seen.append((module, output.detach()))

    linears = [module for module in model.modules() if type(module) is nn.Linear]
    handles = [linear.register_forward_hook(hook) for linear in linears]
    try:
        outputs = forward().detach()
    finally:
        for handle in handles:
            handle.remove()
    for linear, output in reversed(seen):
        if output.shape == outputs.shape and torch.equal(output.to(outputs.dtype), outputs):
            if linear.bias is None:
                raise HeadError(type(model).__name__, "its last linear layer has no bias")
            return linear
    raise HeadError(type(model).__name__, "none of its linear layers puts out what the model puts out")


@torch.no_grad()
def scale_outputs_(head: nn.Linear, scale: Tensor, bias: Tensor) -> None:
    """Makes a layer put out `scale · y + bias` where it put out `y`, in place.

    Args:
        head: With `k` outputs and a bias.
        scale: `[k]`.
        bias: `[k]`.
    """
    scale, bias = scale.to(head.weight.device), bias.to(head.weight.device)
    head.weight.copy_(scale[:, None] * head.weight.to(scale.dtype))
    head.bias.copy_(scale * head.bias.to(scale.dtype) + bias)
