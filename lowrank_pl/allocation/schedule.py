"""How the budget shrinks over a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowrank_pl.errors.budget import ScheduleError
from lowrank_pl.errors.numerics import RangeError


@dataclass
class CubicSchedule:
    """Constant, then falling like a cube, then constant at the target; lengths are shares of the run.

    Args:
        warmup: Share of the steps before the budget starts to fall, `0 <= warmup < 1`: scores need a few steps.
        cooldown: Share of the steps at the end that train at the target, `0 <= cooldown < 1`.
        interval: Share of the steps between two reallocations, `0 < interval <= 1`; at least one step.
        rewarmup: Share of the steps over which learning rates rise anew, linearly, after each reallocation,
            `0 <= rewarmup <= 1`; with 0 they are those of the optimizer and its scheduler throughout.

    References:
        Zhang et al., AdaLoRA, ICLR 2023, equation 12; Hua et al., Dynamic low-rank estimation for transformer-based
        language models, EMNLP Findings 2023.
    """

    warmup: float = 0.3
    cooldown: float = 0.5
    interval: float = 0.05
    rewarmup: float = 0.0

    def __post_init__(self) -> None:
        """Raises an error for shares that leave no time to fall."""
        for name, low in (("warmup", 0.0), ("cooldown", 0.0), ("interval", 1e-9), ("rewarmup", 0.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= 1):
                raise RangeError(
                    f"schedule.{name}", value, f"{'0 <' if low else '0 <='} {name} <= 1, a share of the run"
                )
        if self.warmup + self.cooldown >= 1:
            given = f"schedule.warmup={self.warmup!r} and schedule.cooldown={self.cooldown!r}"
            raise ScheduleError(given, "leave no step in which the budget could fall", "warmup + cooldown < 1")

    def over(self, total_steps: int) -> CubicCurve:
        """The schedule in optimizer steps.

        Args:
            total_steps: Optimizer steps of the whole run, `>= 1`.

        Raises:
            ScheduleError: the run is too short: the cool-down leaves no step before it.
        """
        end = total_steps - round(self.cooldown * total_steps)
        start = min(round(self.warmup * total_steps), end - 1)  # rounding shall not refuse a run of a few steps
        interval = max(1, round(self.interval * total_steps))
        if end < 1:
            given = f"a run of {total_steps} optimizer steps with {self}"
            raise ScheduleError(given, "has no step in which the budget could fall", "longer runs or shorter shares")
        rewarmup = max(1, round(self.rewarmup * total_steps)) if self.rewarmup else 0
        return CubicCurve(start, end, interval, rewarmup)


@dataclass(frozen=True)
class CubicCurve:
    """A `CubicSchedule` in optimizer steps.

    Attributes:
        start: Steps before the budget falls.
        end: The step at which it has reached the target: the last reallocation.
        interval: Steps between reallocations.
        rewarmup: Steps after a reallocation with lower learning rates.
    """

    start: int
    end: int
    interval: int
    rewarmup: int = 0

    def share(self, step: int) -> float:
        """The share of the way from target to start that is still to go: 1 up to `start`, 0 from `end` on."""
        if step <= self.start:
            return 1.0
        if step >= self.end:
            return 0.0
        return (1 - (step - self.start) / (self.end - self.start)) ** 3

    def acts(self, step: int) -> bool:
        """Whether ranks are reallocated after that many steps; not shortly before the last time."""
        on_the_way = self.start < step <= self._last_on_the_way and (step - self.start) % self.interval == 0
        return on_the_way or step == self.end

    @property
    def _last_on_the_way(self) -> float:
        """At the end itself there is one in any case; half an interval is the least between two."""
        return min(self.end - 1, self.end - self.interval / 2)

    def next_action(self, step: int) -> int:
        """The first of the steps from `step` on after which ranks are reallocated; `end` if none comes before it."""
        intervals = max(1, -(-(step - self.start) // self.interval))
        action = self.start + intervals * self.interval
        return action if action <= self._last_on_the_way else self.end

    def actions(self) -> list[int]:
        """All steps after which ranks are reallocated, ascending."""
        found = [self.next_action(self.start + 1)]
        while found[-1] != self.end:
            found.append(self.next_action(found[-1] + 1))
        return found

    def budget(self, step: int, first: float, last: float) -> float:
        """`last + (first − last) · share(step)`."""
        return last + (first - last) * self.share(step)

    def rate(self, steps: int) -> float:
        """What the learning rate is multiplied by in the `steps`-th step after a reallocation, counted from 1."""
        return min(1.0, steps / (self.rewarmup + 1))
