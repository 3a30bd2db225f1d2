"""Reordering and dropping singular groups of a layer in training, its optimizer's state included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pl.errors.run import HiddenOptimizerStateError, OptimizerStateError
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
        HiddenOptimizerStateError: an optimizer keeps state that it does not show. Nothing has been changed then.
    """
    parts = ((layer.left, 1), (layer.sigma, 0), (layer.right, 0))
    tensors = [(parameter.data, dim) for parameter, dim in parts]
    for optimizer in _with_inner(optimizers):
        _check_shows_state(optimizer, [parameter for parameter, _ in parts])
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


def _with_inner(optimizers: Iterable[Optimizer]) -> Iterator[Optimizer]:
    """The optimizers and those that they wrap, as `ZeroRedundancyOptimizer` does: the state may be in either."""
    for optimizer in optimizers:
        yield optimizer
        yield from _with_inner(value for value in vars(optimizer).values() if isinstance(value, Optimizer))


def _check_shows_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    """Raises an error for state that is kept elsewhere: SGD has none at all, a wrapper hides it.

    A parameter without a gradient has had no step, hence no state.
    """
    if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
        return  # a wrapper: what it wraps is looked at by itself
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    without = [p for p in parameters if id(p) in held and p.grad is not None and p not in optimizer.state]
    if without and (optimizer.state or optimizer.state_dict().get("state")):
        raise HiddenOptimizerStateError(type(optimizer).__name__)


def _keep(tensor: Tensor, dim: int, kept: Tensor) -> None:
    chosen = tensor.index_select(dim, kept.to(tensor.device))
    tensor.narrow(dim, 0, kept.numel()).copy_(chosen)
    tensor.narrow(dim, kept.numel(), tensor.shape[dim] - kept.numel()).zero_()


def svd_layers(model: nn.Module) -> dict[str, SVDLinear]:
    """The layers in singular groups, by fully qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SVDLinear)}
