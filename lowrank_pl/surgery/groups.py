"""Reordering and dropping singular groups of a layer in training, its optimizer's state included."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pl.nn import SVDLinear
from lowrank_pl.surgery.optimizer_state import states_of


@torch.no_grad()
def keep_groups_(layer: SVDLinear, kept: Tensor, optimizers: Iterable[Optimizer] = ()) -> None:
    """Keeps some groups and drops the others, without touching a parameter's shape.

    The kept groups come first, in their present order; the dropped ones are set to zero, with everything the
    optimizers remember of them, so that no momentum or decay moves them again.

    Args:
        layer: The layer; its rank becomes the number of kept groups.
        kept: Their indices, ascending, among the groups that count: `[r]`, `1 <= r <= layer.rank`.
        optimizers: Those whose state moves along.

    Raises:
        RankError: no group would be left.
        OptimizerStateError: an optimizer keeps something for these parameters that has neither their shape nor is a
            single number, so that nobody can say which part belongs to which group. Nothing has been changed then.
        HiddenOptimizerStateError: an optimizer keeps state that it does not show. Nothing has been changed then.
    """
    optimizers = list(optimizers)
    tensors = []
    for parameter, dim in ((layer.left, 1), (layer.sigma, 0), (layer.right, 0)):
        tensors.append((parameter.data, dim))
        tensors += [(value, dim) for _, value in states_of(parameter, optimizers)]
    layer.rank = kept.numel()
    for tensor, dim in tensors:
        _keep(tensor, dim, kept)


def _keep(tensor: Tensor, dim: int, kept: Tensor) -> None:
    chosen = tensor.index_select(dim, kept.to(tensor.device))
    tensor.narrow(dim, 0, kept.numel()).copy_(chosen)
    tensor.narrow(dim, kept.numel(), tensor.shape[dim] - kept.numel()).zero_()


def svd_layers(model: nn.Module) -> dict[str, SVDLinear]:
    """The layers in singular groups, by fully qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)}
