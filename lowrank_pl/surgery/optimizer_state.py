"""What optimizers remember of a parameter, for whoever rearranges the parameter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pl.errors.optimizer import HiddenOptimizerStateError, OptimizerStateError, UnknownOptimizerStateError


def states_of(
    parameter: nn.Parameter, optimizers: Iterable[Optimizer], known: Collection[str] | None = None
) -> list[tuple[str, Tensor]]:
    """Every tensor of the parameter's shape that an optimizer keeps for it, with its name, once.

    A wrapper may show what the optimizer that it wraps keeps, as `ZeroRedundancyOptimizer` does in a resumed run.

    Args:
        parameter: Of a layer.
        optimizers: Those that may hold it.
        known: The names that such tensors may have; `None`: any.

    Raises:
        UnknownOptimizerStateError: one has another name.
        OptimizerStateError: an optimizer keeps something for it that has neither its shape nor is a single number, so
            that nobody can say which part belongs to what.
        HiddenOptimizerStateError: an optimizer keeps state that it does not show.
    """
    found: list[tuple[str, Tensor]] = []
    for optimizer in _with_inner(optimizers):
        _check_shows_state(optimizer, parameter)
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                if known is not None and name not in known:
                    raise UnknownOptimizerStateError(type(optimizer).__name__, str(name))
                if all(value.data_ptr() != other.data_ptr() for _, other in found):
                    found.append((str(name), value))
            elif isinstance(value, (list, tuple, dict)) or (isinstance(value, Tensor) and value.numel() != 1):
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise OptimizerStateError(type(optimizer).__name__, str(name), str(shape))
    return found


def _with_inner(optimizers: Iterable[Optimizer]) -> Iterator[Optimizer]:
    """The optimizers and those that they wrap, as `ZeroRedundancyOptimizer` does: the state may be in either."""
    for optimizer in optimizers:
        yield optimizer
        yield from _with_inner(value for value in vars(optimizer).values() if isinstance(value, Optimizer))


def _check_shows_state(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Raises an error for state that is kept elsewhere: SGD has none at all, a wrapper hides it.

    A parameter without a gradient has had no step, hence no state.
    """
    if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
        return  # a wrapper: what it wraps is looked at by itself
    held = any(parameter is p for group in optimizer.param_groups for p in group["params"])
    without = held and parameter.grad is not None and parameter not in optimizer.state
    if without and (optimizer.state or optimizer.state_dict().get("state")):
        raise HiddenOptimizerStateError(type(optimizer).__name__)
