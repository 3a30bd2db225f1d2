"""Reordering and dropping singular groups of a layer in training, its optimizer's state included."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pl.errors.run import OptimizerStateError
from lowrank_pl.nn import SVDLinear


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
    """
    parts = ((layer.left, 1), (layer.sigma, 0), (layer.right, 0))
    tensors = [(parameter.data, dim) for parameter, dim in parts]
    for optimizer in optimizers:
        for parameter, dim in parts:
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    tensors.append((value, dim))
                elif isinstance(value, (list, tuple, dict)) or (isinstance(value, Tensor) and value.numel() != 1):
                    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise OptimizerStateError(type(optimizer).__name__, str(name), str(shape))
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
