"""Optimizer groups, the default schedule, and what a resumed run silently takes from its checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_COMPARED = ("initial_lr", "weight_decay", "betas", "eps", "momentum")


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups of trainable parameters: matrices, and vectors (biases, norms) that get no weight decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def linear_warmup_decay(optimizer: Optimizer, total_steps: int, warmup: float) -> LambdaLR:
    """Learning rate from 0 up over `warmup · total_steps` steps, then linearly down to 0 at the last one."""
    warmup_steps = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return LambdaLR(optimizer, factor)


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
