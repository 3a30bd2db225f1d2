"""Times in turn. No time itself is looked at: machines have moods."""

from __future__ import annotations

from itertools import groupby

import pytest

from lowrank_pl.benchmark.timing import Times, timed_in_turn


def test_functions_are_timed_in_turn() -> None:
    calls: list[str] = []
    steps: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in ("a", "b", "c")}
    found = timed_in_turn(functions, rounds=4, seconds=1e-4, threads=1, done=lambda: steps.append("done"))
    assert [name for name, _ in groupby(calls)] == ["a", "b", "c"] * 5  # the first time before the clock runs
    assert len(steps) == 12
    assert {name: len(times.rounds) for name, times in found.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(seconds > 0 for times in found.values() for seconds in times.rounds)


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that is three times as slow in one round does not change them."""
    one, other = Times((1.0, 3.0, 1.0)), Times((2.0, 6.0, 2.0))
    assert one.over(other) == 0.5
    assert other.over(one) == 2.0
    assert (one.median, one.spread) == (1.0, 3.0)
    with pytest.raises(ValueError, match="zip"):
        one.over(Times((1.0,)))
