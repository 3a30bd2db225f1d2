"""Times of functions that are compared: taken in turn, so that a machine's moods hit all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch.utils.benchmark import Timer


@dataclass(frozen=True)
class Times:
    """Seconds per call, one median per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Longest over shortest round; near 1 on a quiet machine."""
        return max(self.rounds) / min(self.rounds)

    def over(self, other: Times) -> float:
        """Median over rounds of this time divided by the other's of the same round."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True))


def timed_in_turn(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    threads: int,
    done: Callable[[], object] = lambda: None,
) -> dict[str, Times]:
    """Times every function once per round with `torch.utils.benchmark`, which waits for an accelerator.

    Args:
        functions: What to call, by name. Each is called once before anything is timed.
        rounds: `>= 1`.
        seconds: For how long a function is called at least, per round.
        threads: Of the CPU.
        done: Called after each function of each round.
    """
    found: dict[str, list[float]] = {name: [] for name in functions}
    timers = {name: Timer("run()", globals={"run": run}, num_threads=threads) for name, run in functions.items()}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(rounds):
        for name, timer in timers.items():
            found[name].append(timer.blocked_autorange(min_run_time=seconds).median)
            done()
    return {name: Times(tuple(values)) for name, values in found.items()}
