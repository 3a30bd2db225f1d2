"""Learning rates that rise anew after a reallocation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer


class Rewarming:
    """Scales the learning rates for the length of each optimizer step; schedulers and loggers see them as they were.

    Args:
        optimizers: Whose steps.
        factor: What learning rates are multiplied by in the step that is about to be done, `0 < factor <= 1`.
    """

    def __init__(self, optimizers: Sequence[Optimizer], factor: Callable[[], float]) -> None:
        self._factor = factor
        self._before: list[Any] = []
        self._handles = [
            handle
            for optimizer in optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._scale),
                optimizer.register_step_post_hook(self._restore),
            )
        ]

    def close(self) -> None:
        """Leaves the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _scale(self, optimizer: Optimizer, *_: object) -> None:
        factor = self._factor()
        self._before = [group["lr"] for group in optimizer.param_groups]
        if factor < 1:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def _restore(self, optimizer: Optimizer, *_: object) -> None:
        for group, rate in zip(optimizer.param_groups, self._before, strict=True):
            group["lr"] = rate
