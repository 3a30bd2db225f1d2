"""Optimizer groups, the default schedule, and what a resumed run silently takes from its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.optimizer import OptimizerArgumentsError
from lowrank_pl.nn.view import zero_linear

OptimizerFactory = Callable[[Any], Optimizer]
_COMPARED = ("initial_lr", "weight_decay", "betas", "eps", "momentum")


def default_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """AdamW with the settings that tasks have by default."""
    return AdamW(parameters, lr=5e-5, weight_decay=0.01, fused=True)


def leave_unscaling_(optimizer: Optimizer) -> None:
    """Lets a fused optimizer take gradients that somebody else has unscaled, in mixed precision.

    By default its step unscales them itself. With float16, clipping and strategies, which look at gradients before the
    step, would see them scaled. Lightning refuses to clip, with bfloat16 as well, where nothing is ever scaled.
    """
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined] # torch's, without a public name


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups of trainable parameters: matrices, and vectors (biases, norms) that get no weight decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(make: OptimizerFactory, groups: list[dict[str, Any]]) -> Optimizer:
    """The configured optimizer over parameter groups.

    Raises:
        OptimizerArgumentsError: it rejects its arguments, such as a negative learning rate.
    """
    try:
        return make(groups)
    except (ValueError, TypeError) as error:
        raise OptimizerArgumentsError(str(error)) from error


def try_optimizer(make: OptimizerFactory) -> None:
    """Makes the configured optimizer over two small parameters, to refuse bad arguments before there is a model.

    Raises:
        OptimizerArgumentsError: it rejects its arguments.
    """
    # Zeros: random numbers drawn here would give the run's new head other values.
    make_optimizer(make, decay_groups(zero_linear(2, 2, bias=True)))


def linear_warmup_decay(optimizer: Optimizer, total_steps: int, warmup: float) -> LambdaLR:
    """Learning rate from 0 up over `warmup · total_steps` steps, then linearly down to 0 at the last one."""
    return LambdaLR(optimizer, _warmup_and_decay(total_steps, warmup))


def when_stepped(scheduler: Any) -> LRSchedulerConfigType:
    """A scheduler as Lightning wants it: stepped with the optimizer or, where it looks at a score, after every epoch.

    Raises:
        MissingArgumentError: nobody knows at which score.
    """
    if not isinstance(scheduler, ReduceLROnPlateau):
        return {"scheduler": scheduler, "interval": "step"}
    monitor = getattr(scheduler, "monitor", None)  # Lightning's subclass has it
    if monitor is None:
        remedy = "Take lightning.pytorch.cli.ReduceLROnPlateau and give it a monitor, such as val/loss."
        raise MissingArgumentError("what ReduceLROnPlateau looks at", remedy)
    return {"scheduler": scheduler, "interval": "epoch", "monitor": monitor}


def reschedule_(scheduler: LambdaLR, total_steps: int, warmup: float) -> None:
    """Lets a scheduler of `linear_warmup_decay` span another number of steps, because the run's length has changed."""
    scheduler.lr_lambdas = [_warmup_and_decay(total_steps, warmup)] * len(scheduler.lr_lambdas)


def _warmup_and_decay(total_steps: int, warmup: float) -> Callable[[int], float]:
    warmup_steps = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return factor


def set_learning_rate_(optimizers: Iterable[Optimizer], schedulers: Iterable[Any], rate: float) -> None:
    """Sets the rate that schedules scale, in every parameter group, before the first step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = rate
    for scheduler in schedulers:
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [rate] * len(scheduler.base_lrs)


def restart_(schedulers: Iterable[Any]) -> None:
    """Gives the parameter groups of `LambdaLR` schedulers the rates of the step at which they stand."""
    for scheduler in schedulers:
        if isinstance(scheduler, LambdaLR):
            rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, scheduler.optimizer.param_groups, strict=False)
            for base, factor, group in rates:
                group["lr"] = base * factor(scheduler.last_epoch)


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The configured numbers of each parameter group, to compare with what a checkpoint brings."""
    found: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        numbers = {key: group[key] for key in _COMPARED if key in group}
        found.append({"initial_lr": group["lr"], **numbers})
    return found


def overridden(configured: list[dict[str, Any]], optimizer: Optimizer) -> list[str]:
    """Settings that a restored optimizer state has replaced, in words."""
    found = []
    for index, (own, restored) in enumerate(zip(configured, settings(optimizer), strict=False)):
        for key, value in own.items():
            other = restored.get(key)
            if value != (tuple(other) if isinstance(other, list) else other):
                found.append(f"{key}={value!r} of parameter group {index} is ignored for the checkpoint's {other!r}")
    return found
