"""How the budget falls over a run."""

import math
from itertools import pairwise
from typing import Any

import pytest

from lowrank_pl.allocation import CubicCurve, CubicSchedule
from lowrank_pl.errors.budget import ScheduleError
from lowrank_pl.errors.numerics import RangeError

LENGTHS = [*range(1, 41), 99, 100, 101, 1_000, 6_137, 36_816]
SHAPES = [
    CubicSchedule(),
    CubicSchedule(warmup=0.0, cooldown=0.0, interval=0.001),
    CubicSchedule(warmup=0.1, cooldown=0.3, interval=0.05),
    CubicSchedule(warmup=0.0, cooldown=0.45, interval=1.0),
]


def curves() -> list[tuple[int, CubicCurve]]:
    return [(steps, schedule.over(steps)) for schedule in SHAPES for steps in LENGTHS]


def test_the_budget_starts_and_ends_where_it_should() -> None:
    for steps, curve in curves():
        assert curve.budget(0, 700.0, 300.0) == 700.0
        assert curve.budget(curve.start, 700.0, 300.0) == 700.0
        assert curve.budget(curve.end, 700.0, 300.0) == 300.0
        assert curve.budget(steps, 700.0, 300.0) == 300.0
        assert 0 <= curve.start < curve.end <= steps


def test_the_budget_never_rises_and_falls_all_the_way_in_between() -> None:
    for steps, curve in curves():
        shares = [curve.share(step) for step in range(min(steps, 2_000) + 1)]
        assert all(later <= earlier for earlier, later in pairwise(shares))
        falling = shares[curve.start : curve.end + 1]
        assert all(later < earlier for earlier, later in pairwise(falling))


def test_the_last_reallocation_is_at_the_end_and_none_follows() -> None:
    for steps, curve in curves():
        acting = [step for step in range(steps + 1) if curve.acts(step)]
        assert acting[-1] == curve.end
        assert acting[0] > curve.start


def test_the_steps_in_between_are_a_cube() -> None:
    curve = CubicCurve(start=10, end=50, interval=5)
    shares = {0: 1.0, 10: 1.0, 20: 0.75**3, 30: 0.125, 40: 0.25**3, 49: 0.025**3, 50: 0.0, 80: 0.0}
    for step, share in shares.items():
        assert curve.share(step) == pytest.approx(share, rel=1e-12)
    assert curve.budget(30, 900.0, 100.0) == 200.0  # an eighth of the way is left half-way
    assert curve.budget(20, 1_100.0, 100.0) == 100 + 1_000 * 27 / 64


def test_reallocations_are_an_interval_apart_counted_from_the_end_of_the_warm_up() -> None:
    curve = CubicCurve(start=10, end=52, interval=8)
    assert [step for step in range(100) if curve.acts(step)] == [18, 26, 34, 42, 52]  # not at 50
    assert [step for step in range(100) if CubicCurve(10, 26, 8).acts(step)] == [18, 26]


def test_an_interval_longer_than_the_fall_leaves_one_reallocation() -> None:
    curve = CubicSchedule(warmup=0.1, cooldown=0.5, interval=1.0).over(100)
    assert [step for step in range(101) if curve.acts(step)] == [50]


def test_the_default_over_a_thousand_steps() -> None:
    assert CubicSchedule().over(1_000) == CubicCurve(start=300, end=500, interval=50)
    assert [step for step in range(1_001) if CubicSchedule().over(1_000).acts(step)] == [350, 400, 450, 500]
    many = CubicSchedule(warmup=0.05, cooldown=0.5, interval=0.02).over(1_000)
    assert many == CubicCurve(start=50, end=500, interval=20)
    assert len([step for step in range(1_001) if many.acts(step)]) == 23


def test_shares_are_rounded_to_steps_and_the_interval_is_one_at_least() -> None:
    assert CubicSchedule(0.06, 0.34, 0.001).over(99) == CubicCurve(start=6, end=65, interval=1)


def test_without_warm_up_the_budget_falls_after_the_first_step() -> None:
    curve = CubicSchedule(warmup=0.0, cooldown=0.5, interval=0.02).over(100)
    assert curve.start == 0
    assert not curve.acts(0)
    assert curve.share(1) == (49 / 50) ** 3
    assert [step for step in range(101) if curve.acts(step)] == [*range(2, 50, 2), 50]


@pytest.mark.parametrize(("steps", "end"), [(1, 1), (2, 1), (3, 1)])
def test_runs_of_a_few_steps_end_at_the_target(steps: int, end: int) -> None:
    curve = CubicSchedule().over(steps)
    assert curve == CubicCurve(start=0, end=end, interval=1)
    assert [step for step in range(steps + 1) if curve.acts(step)] == [end]
    assert curve.budget(end, 9.0, 4.0) == 4.0


def test_without_cool_down_the_last_step_is_the_last_reallocation() -> None:
    for steps in (1, 2, 3, 100):
        assert CubicSchedule(warmup=0.0, cooldown=0.0).over(steps).end == steps


@pytest.mark.parametrize("name", ["warmup", "cooldown", "interval"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_shares_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(RangeError) as caught:
        CubicSchedule(**given)
    low = "0 <" if name == "interval" else "0 <="
    assert f"schedule.{name}={value!r} is out of range: allowed is {low} {name} <= 1" in str(caught.value)


def test_an_interval_of_zero_is_refused() -> None:
    with pytest.raises(RangeError, match=r"schedule\.interval=0\.0"):
        CubicSchedule(interval=0.0)


@pytest.mark.parametrize(("warmup", "cooldown"), [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.7, 0.6)])
def test_shares_that_leave_nothing_are_refused(warmup: float, cooldown: float) -> None:
    with pytest.raises(ScheduleError) as caught:
        CubicSchedule(warmup, cooldown)
    for part in (f"schedule.warmup={warmup!r}", f"schedule.cooldown={cooldown!r}", "warmup + cooldown < 1"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("warmup", "cooldown", "steps"), [(0.0, 0.9, 1), (0.05, 0.9, 3), (0.05, 0.5, 0)])
def test_a_run_too_short_is_refused(warmup: float, cooldown: float, steps: int) -> None:
    with pytest.raises(ScheduleError) as caught:
        CubicSchedule(warmup, cooldown).over(steps)
    for part in (f"a run of {steps} optimizer steps", f"warmup={warmup}", "no step in which", "longer runs"):
        assert part in str(caught.value)


def test_a_run_is_refused_only_where_the_cool_down_leaves_no_step() -> None:
    for warmup in (0.0, 0.05, 0.3, 0.45):
        for cooldown in (0.0, 0.2, 0.5):
            for steps in range(1, 30):
                schedule = CubicSchedule(warmup, cooldown)
                if round(cooldown * steps) >= steps:
                    with pytest.raises(ScheduleError):
                        schedule.over(steps)
                    continue
                curve = schedule.over(steps)
                assert 0 <= curve.start < curve.end <= steps
                assert curve.start <= round(warmup * steps)
                assert math.isclose(curve.share(curve.start), 1.0)


@pytest.mark.parametrize("curve", [CubicCurve(3, 20, 4), CubicCurve(0, 5, 1), CubicCurve(2, 3, 10)])
def test_the_next_action_is_the_first_from_a_step_on(curve: CubicCurve) -> None:
    actions = [step for step in range(1, 30) if curve.acts(step)]
    for step in range(1, curve.end + 1):
        assert curve.next_action(step) == min(action for action in actions if action >= step)
    assert curve.next_action(curve.end + 3) == curve.end
