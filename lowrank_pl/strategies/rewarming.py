"""Learning rates that rise anew after a reallocation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer


class Rewarming:
    """Scales the learning rates for the length of each optimizer step, the training step within it included.

    Schedulers, checkpoints and what logs before or after a batch see them as they were.

    Args:
        optimizers: Whose steps.
        factor: What learning rates are multiplied by in the step that is about to be done, `0 < factor <= 1`.
    """

    def __init__(self, optimizers: Sequence[Optimizer], factor: Callable[[], float]) -> None:
        self._factor = factor
        self._before: list[tuple[dict[str, Any], Any]] = []  # of the step that is being done
        self._handles = [
            handle
            for optimizer in optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._scale),
                optimizer.register_step_post_hook(self._restore),
            )
        ]

    def close(self) -> None:
        """Leaves the optimizers as they were, also in the middle of a step."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _scale(self, optimizer: Optimizer, *_: object) -> None:
        self._restore()
        factor = self._factor()
        if factor < 1:
            self._before = [(group, group["lr"]) for group in optimizer.param_groups]
            for group, rate in self._before:
                group["lr"] = rate * factor

    def _restore(self, *_: object) -> None:
        for group, rate in self._before:
            group["lr"] = rate
        self._before = []
