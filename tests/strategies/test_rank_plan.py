"""Ranks on the way: two layers of 8 x 8 and one of 16 x 8; two factors have room up to rank 4 and 5."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_pl.allocation import Cost, RankBounds
from lowrank_pl.core import LinearShape
from lowrank_pl.strategies import RankPlan

SHAPES = {"a": LinearShape(8, 8), "b": LinearShape(8, 8), "c": LinearShape(16, 8)}
FULL = dict.fromkeys(SHAPES, 8)


def plan(**bounds: RankBounds) -> RankPlan:
    found = {name: bounds.get(name, RankBounds()) for name in SHAPES}
    return RankPlan(0, SHAPES, FULL, found, Cost(allow_dense=True))


def energies(**scales: float) -> dict[str, Tensor]:
    falling = 0.5 ** torch.arange(8, dtype=torch.float64)
    return {name: scales.get(name, 1.0) * falling for name in SHAPES}


def best(plan: RankPlan, budget: float, scores: dict[str, Tensor], **options: object) -> dict[str, int]:
    settings = {"present": FULL, "floor": 0.0, "final": True, "multiple_of": 1, "ends_dense": True, **options}
    return plan.best(scores, budget, **settings)  # type: ignore[arg-type]


def test_a_layer_that_counts_stays_dense_and_is_paid_as_such() -> None:
    ranks = best(plan(), 64 + 16 + 24, energies(a=1e6))
    assert ranks == {"a": 8, "b": 1, "c": 1}
    assert plan().kept(ranks) == 104


def test_it_is_factorised_where_it_may_not_end_dense() -> None:
    assert best(plan(), 200, energies(a=1e6), ends_dense=False)["a"] < 4  # break-even is 4


def test_ranks_never_rise_and_factors_do_not_become_dense_again() -> None:
    scores = energies(a=1e6)
    scores["a"][2:] = 0  # what a layer of rank 2 has
    ranks = best(plan(), 250, scores, present={"a": 2, "b": 8, "c": 8})
    assert ranks["a"] == 2


def test_the_floor_is_a_share_of_the_uniform_rank() -> None:
    scores = energies(a=1e6, b=1e-9)
    assert best(plan(), 130, scores)["b"] == 1
    # At 130 of 256, uniform ranks are 2 of 8 x 8: half of the weights by r (m + n).
    assert best(plan(), 130, scores, floor=1.0)["b"] == 2


def test_bounds_count_in_the_end_alone_but_the_lower_ones_always() -> None:
    bounded = plan(a=RankBounds(high=1), b=RankBounds(low=3))
    scores = energies(a=1e6, b=1e-9)
    assert best(bounded, 200, scores)["a"] == 1
    assert best(bounded, 200, scores, final=False)["a"] > 1
    assert best(bounded, 150, scores, final=False)["b"] == best(bounded, 150, scores)["b"] == 3


def test_a_lowest_rank_beyond_the_room_means_dense() -> None:
    assert best(plan(b=RankBounds(low=6)), 140, energies(a=1e6, b=1e-9))["b"] == 8


def test_bounds_go_before_the_floor_where_the_budget_has_no_room_for_both() -> None:
    bounded = plan(b=RankBounds(low=3))
    ranks = best(bounded, 48 + 16 + 24, energies(), floor=1.0)
    assert ranks == {"a": 1, "b": 3, "c": 1}


def test_ranks_are_multiples() -> None:
    ranks = best(plan(), 150, energies(), multiple_of=2, floor=0.25)
    assert all(rank % 2 == 0 for rank in ranks.values())


def test_a_floor_below_the_first_multiple_does_not_become_the_uniform_rank() -> None:
    """Uniform ranks at 130 of 256 are 2 everywhere, half of that 1."""
    scores = energies(a=1e6, b=1e-3, c=1e-9)
    ranks = best(plan(), 130, scores, floor=0.5, multiple_of=3, ends_dense=False)
    assert ranks == {"a": 3, "b": 3, "c": 1}
