"""Budgets in parameters, FLOPs and measured time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_pl.allocation import (
    Allocation,
    Budget,
    Cost,
    Flops,
    Latency,
    LayerOverride,
    Measure,
    Parameters,
    globally_ranked,
    rounded,
    uniform_ranks,
)
from lowrank_pl.core import LinearShape
from lowrank_pl.errors.numerics import BudgetError, BudgetUnitError, LatencyTableError, RankError
from lowrank_pl.nn import LowRankLinear, PivotedLinear

UP, SQUARE = LinearShape(16, 4), LinearShape(8, 8)
SHAPES = {"up": UP, "square": SQUARE}
STEPS = {
    "version": 1,
    "shapes": [
        {"out": 16, "in": 4, "dense_nanoseconds": 100, "ranks": [1, 2, 4], "nanoseconds": [40, 60, 120]},
        # Hardware that works in tiles of four: ranks 1 to 4 cost the same, as do 5 to 8.
        {"out": 8, "in": 8, "dense_nanoseconds": 90, "ranks": [1, 4, 5, 8], "nanoseconds": [30, 30, 80, 80]},
    ],
}


def write(path: Path, table: Any = STEPS) -> str:
    path.write_text(table if isinstance(table, str) else json.dumps(table), encoding="utf-8")
    return str(path)


@pytest.fixture
def latency(tmp_path: Path) -> Latency:
    return Latency(write(tmp_path / "latency.json"))


@pytest.mark.parametrize("shape", [UP, SQUARE, LinearShape(3, 5), LinearShape(1, 7), LinearShape(384, 1536)])
@pytest.mark.parametrize(
    "measure",
    [Parameters(), Flops(), Parameters().in_form(PivotedLinear), Flops().in_form(PivotedLinear)],
    ids=["parameters", "flops", "pivoted", "pivoted_flops"],
)
def test_break_even_and_largest_rank_say_what_a_search_through_all_ranks_says(
    measure: Measure, shape: LinearShape
) -> None:
    costs = {rank: measure.factored(shape, rank) for rank in range(1, shape.full_rank + 1)}
    dearer = [rank for rank, cost in costs.items() if cost >= measure.dense(shape)]
    expected = shape.full_rank if measure.form is PivotedLinear else shape.break_even_rank
    assert measure.break_even(shape) == min(dearer) == expected
    for budget in (0, costs[1] - 1, costs[1], measure.dense(shape) / 2, 10 * measure.dense(shape)):
        assert measure.largest_rank(shape, budget) == max([0, *(r for r, cost in costs.items() if cost <= budget)])


def test_a_layer_costs_what_its_state_costs(latency: Latency) -> None:
    for measure, dense, at_two in ((Parameters(), 64, 40), (Flops(), 128, 80), (latency, 100, 60)):
        assert (measure.of(UP, None), measure.of(UP, 2)) == (dense, at_two)
        assert measure.total_dense(SHAPES) == dense + measure.dense(SQUARE)
        allocation = Allocation(SHAPES, {"up": 2, "square": None})
        assert allocation.total_cost(measure) == at_two + measure.dense(SQUARE)
    assert (allocation.parameters("up"), allocation.kept, allocation.dense) == (40, 104, 128)


def test_a_measure_in_another_form_is_another_one() -> None:
    parameters = Parameters().in_form(PivotedLinear)
    assert (parameters.dense(UP), parameters.factored(UP, 2), parameters.factored(UP, 4)) == (64, 36, 64)
    assert (parameters.options(), parameters.identity()) == ({"class": "Parameters"}, "Parameters(form='pivoted')")
    assert Parameters().identity() == "Parameters"
    assert parameters.in_form(LowRankLinear).factored(UP, 2) == 40
    allocation = uniform_ranks(SHAPES, 0.7, cost=parameters)
    assert allocation.ranks == {"up": 2, "square": 3}
    assert (allocation.form, allocation.kept) == (PivotedLinear, 36 + 3 * 13)
    with pytest.raises(RankError):
        parameters.factored(UP, 5)


def test_flops_choose_what_parameters_choose() -> None:
    scores = {name: torch.rand(s.full_rank, generator=torch.Generator().manual_seed(0)) for name, s in SHAPES.items()}
    by_parameters = globally_ranked(scores, SHAPES, 70, per_parameter=True)
    by_flops = globally_ranked(scores, SHAPES, 140, per_parameter=True, cost=Cost(measure=Flops()))
    assert {name: kept.tolist() for name, kept in by_parameters.items()} == {
        name: kept.tolist() for name, kept in by_flops.items()
    }
    assert uniform_ranks(SHAPES, 0.4, cost=Flops()).ranks == uniform_ranks(SHAPES, 0.4).ranks


def test_latency_lies_on_lines_between_measured_ranks(latency: Latency) -> None:
    assert [latency.factored(UP, rank) for rank in (1, 2, 3, 4)] == [40, 60, 90, 120]
    assert [latency.factored(SQUARE, rank) for rank in range(1, 9)] == [30, 30, 30, 30, 80, 80, 80, 80]
    assert latency.dense(UP) == 100
    assert latency.break_even(UP) == 4
    assert latency.break_even(SQUARE) == 9  # never
    assert latency.largest_rank(SQUARE, 45) == 4
    assert latency.largest_rank(SQUARE, 29) == 0
    with pytest.raises(RankError):
        latency.factored(UP, 5)


def test_latency_beyond_the_measured_ranks_goes_on_along_the_last_line(tmp_path: Path) -> None:
    entry = {"out": 16, "in": 16, "dense_nanoseconds": 50, "ranks": [4, 8], "nanoseconds": [20, 40]}
    measure = Latency(write(tmp_path / "t.json", {"version": 1, "shapes": [entry]}))
    assert [measure.factored(LinearShape(16, 16), rank) for rank in (1, 2, 16)] == [5, 10, 80]
    steep = {**entry, "nanoseconds": [10, 90]}
    measure = Latency(write(tmp_path / "s.json", {"version": 1, "shapes": [steep]}))
    # The line would be at -10: no less than a quarter of what four ranks cost.
    assert [measure.factored(LinearShape(16, 16), rank) for rank in (1, 2, 3, 4)] == [2, 5, 8, 10]


def test_a_time_that_falls_with_the_rank_is_raised(tmp_path: Path) -> None:
    entry = {"out": 8, "in": 8, "dense_nanoseconds": 90, "ranks": [2, 4, 6], "nanoseconds": [30, 20, 50]}
    measure = Latency(write(tmp_path / "t.json", {"version": 1, "shapes": [entry]}))
    assert [measure.factored(SQUARE, rank) for rank in (2, 3, 4, 5, 6)] == [30, 30, 30, 40, 50]


def test_uniform_ranks_take_the_share_in_time(latency: Latency) -> None:
    assert uniform_ranks(SHAPES, 0.5, cost=latency).ranks == {"up": 1, "square": 4}
    assert uniform_ranks(SHAPES, 0.95, cost=latency).ranks == {"up": 3, "square": 8}
    assert uniform_ranks(SHAPES, 1.0, cost=latency).ranks == {"up": None, "square": None}
    half = uniform_ranks(SHAPES, 0.95, overrides=[LayerOverride("square", keep_ratio=0.5)], cost=latency)
    assert half.ranks == {"up": 3, "square": 4}
    with pytest.raises(BudgetError, match=r"70 of 190 ns"):
        uniform_ranks(SHAPES, 0.3, cost=latency)


def test_free_groups_are_taken_and_dear_ones_left(latency: Latency) -> None:
    cost = Cost(measure=latency)
    scores = {"up": torch.tensor([1.0, 1.0, 1.0, 1.0]), "square": torch.linspace(0.9, 0.1, 8)}
    kept = globally_ranked(scores, SHAPES, 100, cost=cost)
    # Floor 70; rank 2 of `up` costs 20 more; within a tile `square` gets three groups for nothing.
    assert {name: len(indices) for name, indices in kept.items()} == {"up": 2, "square": 4}
    assert cost.total(SHAPES, {name: len(indices) for name, indices in kept.items()}) == 90


def test_rounding_keeps_to_a_budget_in_time(latency: Latency) -> None:
    cost = Cost(measure=latency)
    scores = {"up": torch.ones(4), "square": torch.ones(8)}
    kept = globally_ranked(scores, SHAPES, 175, cost=cost)
    even = rounded(kept, scores, SHAPES, 175, 2, cost=cost)
    ranks = {name: len(indices) for name, indices in even.items()}
    assert all(rank % 2 == 0 for rank in ranks.values())
    assert cost.total(SHAPES, ranks) <= 175


def test_a_plateau_is_no_reason_to_leave_the_multiple(latency: Latency) -> None:
    """Ranks 1 to 4 of the square layer cost the same: 3 still becomes 2 where nothing pays for more."""
    cost = Cost(measure=latency)
    scores = {"square": torch.tensor([5.0, 4.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0])}
    shapes = {"square": SQUARE}
    even = rounded({"square": torch.arange(3)}, scores, shapes, 30, 8, cost=cost)
    assert len(even["square"]) == 3  # below the multiple
    even = rounded({"square": torch.arange(3)}, scores, shapes, 30, 2, cost=cost)
    assert len(even["square"]) == 4  # free


def test_a_budget_is_resolved_in_the_unit_of_its_cost(latency: Latency) -> None:
    assert Budget(keep_ratio=0.5).resolve(SHAPES, 1000) == 64
    assert Budget(keep_ratio=0.5).resolve(SHAPES, 1000, Cost(measure=Flops())) == 128
    assert Budget(keep_ratio=0.5).resolve(SHAPES, 1000, Cost(measure=latency)) == 95
    with pytest.raises(BudgetError, match=r"70 of 190 ns"):
        Budget(keep_ratio=0.1).resolve(SHAPES, 1000, Cost(measure=latency))
    for budget in (Budget(parameters=64), Budget(model_parameters=2000)):
        with pytest.raises(BudgetUnitError, match="in ns"):
            budget.resolve(SHAPES, 1000, Cost(measure=latency))


def test_a_table_is_known_by_its_times_and_not_by_its_place(tmp_path: Path, latency: Latency) -> None:
    assert Latency(write(tmp_path / "copy.json")).identity() == latency.identity()
    shapes: Any = STEPS["shapes"]
    first, second = shapes
    changed = {"version": 1, "shapes": [first, {**second, "dense_nanoseconds": 91}]}
    assert Latency(write(tmp_path / "other.json", changed)).identity() != latency.identity()
    assert Parameters().identity() != Flops().identity()


def test_options_are_primitives(latency: Latency) -> None:
    assert Parameters().options() == {"class": "Parameters"}
    told = latency.options()
    assert (told["class"], told["table"]) == ("Latency", latency.table)
    assert told["circumstances"] == {"device": None, "dtype": None, "threads": None, "tokens": None}


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("{", "cannot be read"),
        ([], "no latency table"),
        ({"version": 1, "shapes": []}, "no latency table"),
        ({"version": 2, "shapes": []}, "version 1"),
        ({"version": 1}, "no latency table"),
        ({"version": 1, "shapes": [STEPS["shapes"][0], STEPS["shapes"][0]]}, "two entries for one shape"),  # type: ignore[index]
        ({"version": 1, "shapes": [{"out": 1}]}, "damaged"),
        ({"version": 1, "shapes": [{**STEPS["shapes"][0], "ranks": [1, 2]}]}, "one time each"),  # type: ignore[index]
        ({"version": 1, "shapes": [{**STEPS["shapes"][0], "ranks": [2, 1, 4]}]}, "ascend"),  # type: ignore[index]
        ({"version": 1, "shapes": [{**STEPS["shapes"][0], "nanoseconds": [0, 1, 2]}]}, "positive"),  # type: ignore[index]
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, table: Any, problem: str) -> None:
    with pytest.raises(LatencyTableError, match=problem):
        Latency(write(tmp_path / "bad.json", table))


def test_a_missing_table_and_a_missing_shape_are_refused(tmp_path: Path, latency: Latency) -> None:
    with pytest.raises(LatencyTableError, match="cannot be read"):
        Latency(str(tmp_path / "none.json"))
    with pytest.raises(LatencyTableError, match=r"7 x 7, only for 16 x 4, 8 x 8"):
        latency.dense(LinearShape(7, 7))
