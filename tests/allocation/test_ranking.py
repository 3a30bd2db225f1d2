"""Singular groups ranked across layers: tiny layers of which every choice can be tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from lowrank_pl.allocation import Cost, RankBounds, globally_ranked, rounded
from lowrank_pl.allocation.ranking import bounds_of
from lowrank_pl.core import LinearShape
from lowrank_pl.errors.numerics import RangeError, RankError, ShapeError
from lowrank_pl.errors.targets import OverrideError
from tests.core.matrices import random_importance

EQUAL = {name: LinearShape(6, 6) for name in ("a", "b", "c")}
MIXED = {
    "up": LinearShape(16, 4),
    "down": LinearShape(4, 16),
    "square": LinearShape(8, 8),
    "narrow": LinearShape(2, 10),
}


def random_scores(shapes: Mapping[str, LinearShape], seed: int = 0) -> dict[str, Tensor]:
    return {name: random_importance(s.full_rank, seed=seed + i) for i, (name, s) in enumerate(shapes.items())}


def cost_of(shapes: Mapping[str, LinearShape], kept: Mapping[str, Tensor], cost: Cost | None = None) -> int:
    return (cost or Cost()).total(shapes, ranks_of(kept))


def ranks_of(kept: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: indices.numel() for name, indices in kept.items()}


def sum_of(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> float:
    return sum(float(scores[name][indices].double().sum()) for name, indices in kept.items())


def as_lists(kept: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: indices.tolist() for name, indices in kept.items()}


def every_choice(shapes: Mapping[str, LinearShape]) -> Iterator[dict[str, Tensor]]:
    """Every choice of groups that empties no layer."""
    choices = [
        [torch.tensor(c) for rank in range(1, s.full_rank + 1) for c in combinations(range(s.full_rank), rank)]
        for s in shapes.values()
    ]
    for choice in product(*choices):
        yield dict(zip(shapes, choice, strict=True))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize("cost", [Cost(), Cost(allow_dense=True)], ids=["factored", "dense"])
def test_the_budget_is_never_exceeded_and_no_layer_emptied(seed: int, per_parameter: bool, cost: Cost) -> None:
    scores = random_scores(MIXED, 10 * seed)
    floor, full = (
        cost.total(MIXED, ranks) for ranks in (dict.fromkeys(MIXED, 1), {n: s.full_rank for n, s in MIXED.items()})
    )
    for budget in range(floor, full + 10):
        kept = globally_ranked(scores, MIXED, budget, per_parameter=per_parameter, cost=cost)
        assert list(kept) == list(MIXED)
        assert cost_of(MIXED, kept, cost) <= budget
        assert min(ranks_of(kept).values()) >= 1
        # No group that is left out could still be paid for.
        for name, shape in MIXED.items():
            if kept[name].numel() < shape.full_rank:
                more = {**ranks_of(kept), name: kept[name].numel() + 1}
                assert cost.total(MIXED, more) > budget


@pytest.mark.parametrize("seed", range(4))
def test_each_layer_keeps_its_best_groups_in_ascending_order(seed: int) -> None:
    scores = random_scores(MIXED, 10 * seed)
    for indices, score in zip(globally_ranked(scores, MIXED, 150).values(), scores.values(), strict=True):
        assert indices.tolist() == sorted(score.topk(indices.numel()).indices.tolist())
        assert indices.dtype is torch.int64


@pytest.mark.parametrize("seed", range(4))
def test_at_equal_costs_nothing_scores_more(seed: int) -> None:
    shapes = {name: LinearShape(4, 4) for name in ("a", "b", "c")}
    scores = random_scores(shapes, 10 * seed)
    best: dict[int, float] = {}
    for choice in every_choice(shapes):
        spent = cost_of(shapes, choice)
        best[spent] = max(best.get(spent, 0.0), sum_of(scores, choice))
    assert sorted(best) == [8 * groups for groups in range(3, 13)]
    for budget, score in best.items():
        for slack in (0.0, 0.5, 7.0):
            assert sum_of(scores, globally_ranked(scores, shapes, budget + slack)) == pytest.approx(score, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_per_parameter_nothing_scores_more_at_the_cost_that_is_spent(seed: int) -> None:
    # Where the greedy order runs into the budget exactly, it is the best choice of that cost.
    shapes = {"a": LinearShape(3, 3), "b": LinearShape(3, 9)}
    scores = random_scores(shapes, 10 * seed)
    ratios = sorted(
        (
            (float(value) / shapes[name].params_per_rank, name)
            for name in shapes
            for value in scores[name].sort().values[:-1]
        ),
        reverse=True,
    )
    budget = sum(shape.params_per_rank for shape in shapes.values())
    for _, name in ratios:
        budget += shapes[name].params_per_rank
        kept = globally_ranked(scores, shapes, budget, per_parameter=True)
        assert cost_of(shapes, kept) == budget
        others = [sum_of(scores, c) for c in every_choice(shapes) if cost_of(shapes, c) <= budget]
        assert sum_of(scores, kept) == pytest.approx(max(others), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_at_equal_costs_a_shrinking_budget_only_drops(seed: int) -> None:
    scores = random_scores(EQUAL, 10 * seed)
    before = {name: set(range(6)) for name in EQUAL}
    for budget in range(12 * 18, 12 * 3 - 1, -5):
        kept = {name: set(indices.tolist()) for name, indices in globally_ranked(scores, EQUAL, budget).items()}
        assert all(kept[name] <= before[name] for name in EQUAL)
        assert sum(map(len, kept.values())) == budget // 12
        before = kept


@pytest.mark.parametrize("seed", range(3))
def test_at_equal_costs_it_does_not_matter_how_many_times_is_pruned(seed: int) -> None:
    scores = random_scores(EQUAL, 10 * seed)
    first = globally_ranked(scores, EQUAL, 12 * 13)
    second = globally_ranked({name: scores[name][first[name]] for name in EQUAL}, EQUAL, 12 * 7)
    assert as_lists({name: first[name][second[name]] for name in EQUAL}) == as_lists(
        globally_ranked(scores, EQUAL, 12 * 7)
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("per_parameter", [False, True])
def test_ties_go_to_the_first_groups_of_the_first_layers_and_empty_none(value: float, per_parameter: bool) -> None:
    scores = {name: torch.full((6,), value) for name in EQUAL}
    kept = globally_ranked(scores, EQUAL, 12 * 9, per_parameter=per_parameter)
    assert as_lists(kept) == {"a": [0, 1, 2, 3, 4, 5], "b": [0, 1], "c": [0]}
    assert as_lists(globally_ranked(scores, EQUAL, 12 * 3)) == {"a": [0], "b": [0], "c": [0]}


def test_a_layer_without_any_score_keeps_a_group() -> None:
    scores = {"a": torch.zeros(6), "b": torch.arange(1.0, 7.0), "c": torch.arange(1.0, 7.0)}
    kept = globally_ranked(scores, EQUAL, 12 * 13)
    assert as_lists(kept) == {"a": [0], "b": [0, 1, 2, 3, 4, 5], "c": [0, 1, 2, 3, 4, 5]}


def test_scaling_all_scores_changes_nothing() -> None:
    scores = random_scores(MIXED)
    expected = as_lists(globally_ranked(scores, MIXED, 150))
    for factor in (1e-6, 64.0):
        assert as_lists(globally_ranked({n: s * factor for n, s in scores.items()}, MIXED, 150)) == expected


def test_per_parameter_a_group_of_a_larger_matrix_must_be_worth_more() -> None:
    shapes = {"large": LinearShape(12, 8), "small": LinearShape(3, 2)}  # 20 and 5 parameters a group
    scores = {"large": torch.tensor([9.0, 3.0]), "small": torch.tensor([9.0, 1.0])}
    # One group each costs 25, and 20 are left: enough for either.
    assert as_lists(globally_ranked(scores, shapes, 45)) == {"large": [0, 1], "small": [0]}
    assert as_lists(globally_ranked(scores, shapes, 45, per_parameter=True)) == {"large": [0], "small": [0, 1]}
    scores["large"] = torch.tensor([9.0, 4.1])  # more than four times as much
    assert as_lists(globally_ranked(scores, shapes, 45, per_parameter=True)) == {"large": [0, 1], "small": [0]}


def test_a_group_that_is_too_dear_leaves_the_rest_to_cheaper_ones() -> None:
    shapes = {"large": LinearShape(12, 8), "small": LinearShape(3, 2)}
    scores = {"large": torch.tensor([9.0, 3.0]), "small": torch.tensor([9.0, 1.0])}
    assert as_lists(globally_ranked(scores, shapes, 44)) == {"large": [0], "small": [0, 1]}


def test_at_equal_shapes_per_parameter_changes_nothing() -> None:
    scores = random_scores(EQUAL)
    for groups in range(3, 19):
        plain, divided = (globally_ranked(scores, EQUAL, 12 * groups, per_parameter=p) for p in (False, True))
        assert as_lists(plain) == as_lists(divided)


def test_a_dense_weight_is_never_dearer_and_the_groups_it_holds_are_free() -> None:
    cost, shape = Cost(allow_dense=True), LinearShape(6, 6)
    # Break-even is at rank 3: 3 · 12 = 36 = 6 · 6.
    assert [cost.of(shape, rank) for rank in range(1, 7)] == [12, 24, 36, 36, 36, 36]
    assert [Cost().of(shape, rank) for rank in range(1, 7)] == [12, 24, 36, 48, 60, 72]
    scores = {"a": torch.arange(6.0, 0.0, -1), "b": torch.full((6,), 0.5), "c": torch.full((6,), 0.5)}
    assert ranks_of(globally_ranked(scores, EQUAL, 60, cost=cost)) == {"a": 6, "b": 1, "c": 1}
    assert ranks_of(globally_ranked(scores, EQUAL, 60)) == {"a": 3, "b": 1, "c": 1}
    assert ranks_of(globally_ranked(scores, EQUAL, 108, cost=cost)) == {"a": 6, "b": 6, "c": 6}


def test_the_last_group_before_a_dense_weight_costs_only_what_is_missing() -> None:
    shape, cost = LinearShape(3, 5), Cost(allow_dense=True)
    assert [cost.of(shape, rank) for rank in (1, 2, 3)] == [8, 15, 15]
    scores = {"a": torch.tensor([3.0, 1.0, 2.0])}
    assert as_lists(globally_ranked(scores, {"a": shape}, 14, cost=cost)) == {"a": [0]}
    assert as_lists(globally_ranked(scores, {"a": shape}, 15, cost=cost)) == {"a": [0, 1, 2]}


def test_the_total_cost_is_the_sum_over_layers() -> None:
    ranks = {"up": 4, "down": 1, "square": 5, "narrow": 2}
    assert Cost().total(MIXED, ranks) == 80 + 20 + 80 + 24
    assert Cost(allow_dense=True).total(MIXED, ranks) == 64 + 20 + 64 + 20


def test_bounds_hold_whatever_the_scores_say() -> None:
    scores = {"a": torch.full((6,), 9.0), "b": torch.full((6,), 5.0), "c": torch.full((6,), 1.0)}
    bounds = {"a": RankBounds(high=2), "c": RankBounds(low=3)}
    for groups in range(5, 19):
        ranks = ranks_of(globally_ranked(scores, EQUAL, 12 * groups, bounds))
        assert ranks["a"] <= 2
        assert ranks["c"] >= 3
        assert sum(ranks.values()) == min(groups, 2 + 6 + 6)
    assert ranks_of(globally_ranked(scores, EQUAL, 12 * 9, bounds)) == {"a": 2, "b": 4, "c": 3}


def test_the_lowest_ranks_are_filled_with_the_best_groups() -> None:
    scores = {**random_scores(EQUAL), "c": torch.tensor([1.0, 5.0, 2.0, 4.0, 0.0, 3.0]) * 1e-9}
    assert as_lists(globally_ranked(scores, EQUAL, 60, {"c": RankBounds(low=3)}))["c"] == [1, 3, 5]


def test_a_lowest_rank_above_the_groups_that_are_left_keeps_those() -> None:
    scores = {"a": torch.ones(6), "b": torch.ones(2), "c": torch.ones(6)}
    assert ranks_of(globally_ranked(scores, EQUAL, 12 * 5, {"b": RankBounds(low=4)})) == {"a": 2, "b": 2, "c": 1}


@pytest.mark.parametrize(
    ("bounds", "floor"), [({}, 36), ({"a": RankBounds(low=4)}, 72), ({"a": RankBounds(low=2, high=2)}, 48)]
)
def test_a_budget_below_the_lowest_ranks_is_refused_with_what_they_cost(
    bounds: dict[str, RankBounds], floor: int
) -> None:
    scores = random_scores(EQUAL)
    assert cost_of(EQUAL, globally_ranked(scores, EQUAL, floor, bounds)) == floor
    with pytest.raises(
        RangeError, match=rf"budget={floor - 1} is out of range: allowed is at least {floor} parameters"
    ):
        globally_ranked(scores, EQUAL, floor - 1, bounds)


def test_scores_of_other_layers_or_of_none_are_refused() -> None:
    scores = random_scores(EQUAL)
    for given in ({n: s for n, s in scores.items() if n != "b"}, {**scores, "b": torch.tensor([])}):
        with pytest.raises(ShapeError, match="one non-empty score per layer, 3 layers"):
            globally_ranked(given, EQUAL, 100)


def test_scores_are_left_alone_and_may_be_of_any_dtype() -> None:
    scores = {name: torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0, 4.0], requires_grad=True) for name in EQUAL}
    halves = {name: score.detach().bfloat16() for name, score in scores.items()}
    assert as_lists(globally_ranked(scores, EQUAL, 12 * 9)) == as_lists(globally_ranked(halves, EQUAL, 12 * 9))
    assert scores["a"].tolist() == [3.0, 1.0, 2.0, 0.0, 5.0, 4.0]


@pytest.mark.parametrize("low", [0, -1])
def test_a_lowest_rank_below_one_is_refused(low: int) -> None:
    with pytest.raises(RangeError, match=rf"bounds\['\*\.x'\]\.low={low} is out of range"):
        RankBounds("*.x", low=low)


def test_a_highest_rank_below_the_lowest_is_refused() -> None:
    with pytest.raises(RangeError, match=r"bounds\['\*'\]\.high=2 is out of range: allowed is low \(3\) or more"):
        RankBounds(low=3, high=2)
    assert RankBounds(low=3, high=3).high == 3


def test_the_first_bound_that_matches_wins_and_the_others_have_none() -> None:
    bounds = [RankBounds("u*", low=2), RankBounds("*p*", high=3), RankBounds("down", low=4)]
    found = bounds_of(MIXED, bounds)
    assert list(found) == list(MIXED)
    assert found["up"] is bounds[0]
    assert found["down"] is bounds[2]
    assert (found["square"].low, found["square"].high) == (1, None)


def test_a_bound_that_matches_nothing_is_refused_with_names() -> None:
    with pytest.raises(OverrideError) as caught:
        bounds_of(MIXED, [RankBounds("Up")])
    assert "'Up' matches no targeted layer" in str(caught.value)
    assert "'up'" in str(caught.value)


def test_a_lowest_rank_above_the_full_rank_names_the_layer() -> None:
    with pytest.raises(RankError, match=r"rank 3 for 'narrow' is impossible.*= 2"):
        bounds_of(MIXED, [RankBounds(low=3)])


LARGE = {"a": LinearShape(24, 24), "b": LinearShape(48, 24), "c": LinearShape(24, 96), "d": LinearShape(20, 24)}


def ranked_and_rounded(
    budget: float,
    multiple_of: int,
    seed: int = 0,
    bounds: Mapping[str, RankBounds] | None = None,
    cost: Cost | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    scores = random_scores(LARGE, 10 * seed)
    kept = globally_ranked(scores, LARGE, budget, bounds, per_parameter=True, cost=cost)
    return scores, kept, rounded(kept, scores, LARGE, budget, multiple_of, bounds, cost)


@pytest.mark.parametrize("multiple_of", [2, 4, 5, 8])
@pytest.mark.parametrize("budget", [300, 800, 1500, 2500, 4000, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_rounded_ranks_are_multiples_within_the_budget(multiple_of: int, budget: int, seed: int) -> None:
    scores, kept, after = ranked_and_rounded(budget, multiple_of, seed)
    assert list(after) == list(LARGE)
    assert cost_of(LARGE, after) <= budget
    for name, rank in ranks_of(after).items():
        # A rank below the multiple stays, if there is no money for more.
        assert rank % multiple_of == 0 or rank == ranks_of(kept)[name] < multiple_of
        assert rank > ranks_of(kept)[name] - multiple_of
        assert after[name].tolist() == sorted(scores[name].topk(rank).indices.tolist())
        # What is left over does not pay for another multiple.
        more = {**ranks_of(after), name: rank + multiple_of - rank % multiple_of}
        if more[name] <= LARGE[name].full_rank:
            assert Cost().total(LARGE, more) > budget


def test_rounding_to_one_changes_nothing() -> None:
    for budget in (300, 1000, 3000):
        _, kept, after = ranked_and_rounded(budget, 1)
        assert as_lists(after) == as_lists(kept)


def test_what_rounding_frees_goes_where_the_next_groups_are_worth_most() -> None:
    shapes = {name: LinearShape(8, 8) for name in ("a", "b")}
    scores = {"a": torch.tensor([9.0, 8, 7, 6, 5, 1, 1, 1]), "b": torch.tensor([9.0, 8, 7, 6, 5, 4, 4, 1])}
    kept = globally_ranked(scores, shapes, 16 * 12)
    assert ranks_of(kept) == {"a": 5, "b": 7}
    # Down to 4 and 4; the four groups that are free again pay for 4 … 7 of either.
    assert ranks_of(rounded(kept, scores, shapes, 16 * 12, 4)) == {"a": 4, "b": 8}
    assert ranks_of(rounded(kept, scores, shapes, 16 * 12 - 1, 4)) == {"a": 4, "b": 4}


def test_what_rounding_frees_looks_at_the_next_groups_alone() -> None:
    shapes = {name: LinearShape(8, 8) for name in ("a", "b")}
    scores = {"a": torch.tensor([900.0, 800, 700, 600, 2, 2, 2, 2]), "b": torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2])}
    kept = {"a": torch.arange(6), "b": torch.arange(6)}
    assert ranks_of(rounded(kept, scores, shapes, 16 * 12, 4)) == {"a": 4, "b": 8}


def test_what_rounding_frees_goes_by_the_score_per_parameter() -> None:
    shapes = {"large": LinearShape(24, 8), "small": LinearShape(8, 8)}  # 32 and 16 parameters a group
    kept = {"large": torch.arange(6), "small": torch.arange(6)}
    # Down to 4 and 4, which cost 192; 128 are left, for four of either.
    # The next four of the large layer are worth 12 for 128 parameters, those of the small one 8 for 64.
    scores = {"large": torch.tensor([9.0] * 4 + [3.0] * 4), "small": torch.tensor([9.0] * 4 + [2.0] * 4)}
    assert ranks_of(rounded(kept, scores, shapes, 320, 4)) == {"large": 4, "small": 8}
    scores["small"][4:] = 1.4
    assert ranks_of(rounded(kept, scores, shapes, 320, 4)) == {"large": 8, "small": 4}


def test_a_rank_below_the_multiple_stays_or_grows_to_it() -> None:
    shapes = {name: LinearShape(8, 8) for name in ("a", "b")}
    scores = {"a": torch.arange(8.0, 0, -1), "b": torch.arange(8.0, 0, -1) / 100}
    kept = {"a": torch.arange(5), "b": torch.arange(2)}
    assert ranks_of(rounded(kept, scores, shapes, 16 * 7, 4)) == {"a": 4, "b": 2}  # the third is money for nothing
    assert ranks_of(rounded(kept, scores, shapes, 16 * 8, 4)) == {"a": 4, "b": 4}


def test_rounding_up_stays_below_the_highest_rank() -> None:
    _, kept, after = ranked_and_rounded(10_000, 8, bounds={"a": RankBounds(high=20), "b": RankBounds(high=16)})
    assert ranks_of(kept) == {"a": 20, "b": 16, "c": 24, "d": 20}
    assert ranks_of(after) == {"a": 16, "b": 16, "c": 24, "d": 16}


def test_rounding_down_stays_at_or_above_the_lowest_rank() -> None:
    bounds = {"c": RankBounds(low=6)}
    for budget in range(900, 2_500, 50):
        _, _, after = ranked_and_rounded(budget, 4, bounds=bounds)
        assert ranks_of(after)["c"] >= 6
        assert cost_of(LARGE, after) <= budget


def test_rounding_a_layer_that_ends_dense_drops_no_group_for_nothing() -> None:
    shapes = {"a": LinearShape(6, 6), "b": LinearShape(6, 6)}
    scores = {"a": torch.full((6,), 2.0), "b": torch.ones(6)}
    cost = Cost(allow_dense=True)
    kept = globally_ranked(scores, shapes, 48, cost=cost)
    assert ranks_of(kept) == {"a": 6, "b": 1}
    # Rank 4 costs what the dense weight costs, as does rank 6.
    assert ranks_of(rounded(kept, scores, shapes, 48, 4, cost=cost)) == {"a": 6, "b": 1}


@pytest.mark.parametrize("multiple_of", [2, 4, 8])
@pytest.mark.parametrize("budget", [800, 1500, 2500, 3500])
def test_rounding_with_dense_weights_stays_within_the_budget(multiple_of: int, budget: int) -> None:
    cost = Cost(allow_dense=True)
    _, _, after = ranked_and_rounded(budget, multiple_of, cost=cost)
    assert cost_of(LARGE, after, cost) <= budget
    for name, rank in ranks_of(after).items():
        assert rank % multiple_of == 0 or rank < multiple_of or rank >= LARGE[name].break_even_rank
