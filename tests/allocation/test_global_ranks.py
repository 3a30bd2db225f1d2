import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowrank_pl.allocation import Allocation, Flops, Global, Latency, LayerOverride, Measure, Parameters, RankRequest
from lowrank_pl.core import EmbeddingShape, LinearShape
from lowrank_pl.errors.numerics import BudgetError, LatencyTableError, NonFiniteError, RangeError, ShapeError
from lowrank_pl.errors.targets import OverrideError
from lowrank_pl.nn import PivotedLinear

SHAPES = {"a": LinearShape(6, 6), "b": LinearShape(12, 4), "c": LinearShape(5, 10)}


def energies_of(shapes: dict[str, LinearShape], seed: int = 0, spread: float = 2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index, (name, shape) in enumerate(shapes.items()):
        values = (spread * torch.randn(shape.full_rank, generator=generator, dtype=torch.float64)).exp()
        found[name] = values.sort(descending=True).values * 10.0 ** (index % 3)
    return found


def cost_of(allocation: Allocation, cost: Measure) -> int:
    return sum(
        cost.dense(shape) if (rank := allocation.ranks[name]) is None else cost.factored(shape, rank)
        for name, shape in allocation.shapes.items()
    )


def kept(allocation: Allocation, energies: dict[str, Tensor]) -> float:
    return sum(float(energy[: allocation.ranks[name]].sum()) for name, energy in energies.items())


def best_by_trying(
    shapes: dict[str, LinearShape], energies: dict[str, Tensor], lows: dict[str, int], budget: float, cost: Measure
) -> float:
    """The most energy that any combination of ranks keeps within a budget."""
    choices = []
    for name, shape in shapes.items():
        ranks: list[int | None] = [None, *range(lows[name], cost.break_even(shape))]
        choices.append(ranks)
    best = -1.0
    for combination in itertools.product(*choices):
        allocation = Allocation(shapes, dict(zip(shapes, combination, strict=True)))
        if cost_of(allocation, cost) <= budget:
            best = max(best, kept(allocation, energies))
    return best


def latency(tmp_path: Path, shapes: dict[str, LinearShape]) -> Latency:
    """Times with a constant part and a step, as hardware has them."""
    entries = []
    for shape in {(s.out_features, s.in_features): s for s in shapes.values()}.values():
        ranks = list(range(1, shape.full_rank + 1))
        times = [200 + 40 * (rank // 2) * shape.params_per_rank for rank in ranks]
        told = {"out": shape.out_features, "in": shape.in_features, "dense_nanoseconds": times[-2]}
        entries.append({**told, "ranks": ranks, "nanoseconds": times})
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"version": 1, "shapes": entries}))
    return Latency(str(path))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratio", [0.35, 0.5, 0.66, 0.8, 0.95])
@pytest.mark.parametrize("floor", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("unit", ["parameters", "flops", "pivoted", "latency"])
def test_within_one_step_of_the_best_by_trying_all(
    seed: int, ratio: float, floor: float, unit: str, tmp_path: Path
) -> None:
    known = {"parameters": Parameters(), "flops": Flops(), "pivoted": Parameters().in_form(PivotedLinear)}
    cost: Measure = known.get(unit) or latency(tmp_path, SHAPES)
    energies = energies_of(SHAPES, seed)
    request = RankRequest(SHAPES, keep_ratio=ratio, cost=cost)
    try:
        uniform = request.uniform()
    except BudgetError:
        pytest.skip("no ranks at all meet this budget")
    allocation = Global(floor).allocate(request, energies)
    budget = ratio * sum(cost.dense(shape) for shape in SHAPES.values()) + 1e-6
    assert cost_of(allocation, cost) <= budget
    lows = {
        n: max(1, int(floor * (uniform.ranks[n] or min(cost.break_even(s), s.full_rank)))) for n, s in SHAPES.items()
    }
    best = best_by_trying(SHAPES, energies, lows, budget, cost)
    # What a greedy choice misses is less than the one step that did not fit: a rank, or from the last rank to dense.
    steps = [float(max(energies[n][lows[n]], energies[n][cost.break_even(s) - 2 :].sum())) for n, s in SHAPES.items()]
    assert kept(allocation, energies) >= best - max(steps)
    if floor < 1:
        assert kept(allocation, energies) >= kept(uniform, energies) * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_exactly_the_best_where_every_rank_costs_the_same(seed: int) -> None:
    # Equal shapes far from break-even: the greedy choice is then optimal.
    shapes = {name: LinearShape(30, 30) for name in "ab"}
    energies = energies_of(shapes, seed)
    request = RankRequest(shapes, keep_ratio=0.3)
    allocation = Global(0).allocate(request, energies)
    best = best_by_trying(shapes, energies, dict.fromkeys(shapes, 1), 0.3 * 1800, Parameters())
    assert kept(allocation, energies) == pytest.approx(best)


def test_scaling_all_energies_changes_nothing() -> None:
    energies = energies_of(SHAPES)
    request = RankRequest(SHAPES, keep_ratio=0.6)
    scaled = {name: 1e-20 * energy for name, energy in energies.items()}
    assert Global().allocate(request, scaled).ranks == Global().allocate(request, energies).ranks


def test_a_layer_that_no_loss_depends_on_gets_the_floor() -> None:
    shapes = {name: LinearShape(40, 40) for name in "abc"}
    energies = dict.fromkeys(shapes, energies_of(shapes)["a"]) | {"b": torch.zeros(40)}
    uniform = RankRequest(shapes, keep_ratio=0.5).uniform()
    allocation = Global(0.5).allocate(RankRequest(shapes, keep_ratio=0.5), energies)
    assert allocation.ranks["b"] == int(0.5 * (uniform.ranks["b"] or 0))
    assert (allocation.ranks["a"] or 99) > (uniform.ranks["a"] or 0)


def test_a_dense_layer_is_found_although_the_ranks_before_it_are_poor_bargains() -> None:
    # All of a layer's energy in groups beyond break-even: only dense keeps it.
    shapes = {"flat": LinearShape(20, 20), "steep": LinearShape(20, 20)}
    steep = torch.zeros(20, dtype=torch.float64)
    steep[:3] = 1.0
    energies = {"flat": torch.full((20,), 10.0, dtype=torch.float64), "steep": steep}
    allocation = Global(0).allocate(RankRequest(shapes, keep_ratio=0.7), energies)
    assert allocation.ranks["flat"] is None
    assert (allocation.ranks["steep"] or 0) >= 3


def test_a_layer_that_cannot_be_dense_keeps_its_place_among_the_bargains() -> None:
    shapes = {"flat": LinearShape(20, 20), "steep": LinearShape(20, 20)}
    energies = {name: torch.ones(20, dtype=torch.float64) for name in shapes}
    energies["steep"] *= 0.4 * 0.9 ** torch.arange(20)
    request = RankRequest(shapes, keep_ratio=0.4)  # eight ranks; dense would cost ten
    allocation = Global(0).allocate(request, energies)
    best = best_by_trying(shapes, energies, dict.fromkeys(shapes, 1), 0.4 * 800, Parameters())
    assert kept(allocation, energies) == pytest.approx(best)
    assert allocation.ranks == {"flat": 7, "steep": 1}


def test_everything_dense_at_one() -> None:
    allocation = Global().allocate(RankRequest(SHAPES, keep_ratio=1.0), energies_of(SHAPES))
    assert set(allocation.ranks.values()) == {None}


def test_no_more_than_the_remainder_of_one_rank_is_left() -> None:
    shapes = {f"{name}{i}": LinearShape(48, 32 * (1 + i % 2)) for i, name in enumerate("abcdefgh")}
    for seed, ratio in itertools.product(range(5), (0.2, 0.33, 0.5)):
        allocation = Global().allocate(RankRequest(shapes, keep_ratio=ratio), energies_of(shapes, seed))
        budget = ratio * sum(shape.dense_params for shape in shapes.values())
        below = [s.params_per_rank for n, s in shapes.items() if allocation.ranks[n] is not None]
        assert budget - min(below) < allocation.kept <= budget


@pytest.mark.parametrize("multiple", [2, 4])
def test_multiples(multiple: int) -> None:
    shapes = {name: LinearShape(64, 48) for name in "abc"}
    request = RankRequest(shapes, keep_ratio=0.5, multiple_of=multiple)
    allocation = Global().allocate(request, energies_of(shapes))
    assert all(rank is None or rank % multiple == 0 for rank in allocation.ranks.values())
    assert allocation.kept <= 0.5 * allocation.dense


def test_overrides_stand_apart() -> None:
    shapes = {name: LinearShape(40, 40) for name in "abcd"}
    overrides = [LayerOverride("a", dense=True), LayerOverride("b", rank=3)]
    allocation = Global().allocate(RankRequest(shapes, keep_ratio=0.4, overrides=overrides), energies_of(shapes))
    assert allocation.ranks["a"] is None
    assert allocation.ranks["b"] == 3
    others = allocation.parameters("c") + allocation.parameters("d")
    assert 0.4 * 3200 - 80 < others <= 0.4 * 3200


def test_rank_ratio_is_a_budget_over_all_layers() -> None:
    shapes = {name: LinearShape(40, 40) for name in "abc"}
    request = RankRequest(shapes, rank_ratio=0.25)
    allocation = Global().allocate(request, energies_of(shapes))
    assert allocation.kept <= request.uniform().kept
    assert allocation.kept > request.uniform().kept - 80


@pytest.mark.parametrize("floor", [-0.1, 1.1, math.nan, math.inf])
def test_a_floor_above_the_budget_is_refused(floor: float) -> None:
    with pytest.raises(RangeError, match="floor"):
        Global(floor)


def test_a_look_up_keeps_its_uniform_rank_unless_told_otherwise() -> None:
    shapes = {"words": EmbeddingShape(8, 40), "a": LinearShape(20, 20), "b": LinearShape(20, 20)}
    energies = energies_of(shapes) | {"words": torch.zeros(8, dtype=torch.float64)}
    request = RankRequest(shapes, keep_ratio=0.5)
    uniform = request.uniform().ranks["words"]
    assert uniform is not None
    assert uniform > 1
    assert Global().allocate(request, energies).ranks["words"] == uniform
    assert Global(vocabulary_floor=0.0).allocate(request, energies).ranks["words"] == 1
    with pytest.raises(RangeError, match="vocabulary_floor"):
        Global(vocabulary_floor=1.5)


def test_bad_energies_and_requests_are_refused() -> None:
    energies = energies_of(SHAPES)
    with pytest.raises(ShapeError, match="'a'"):
        Global().allocate(RankRequest(SHAPES, keep_ratio=0.5), {})
    with pytest.raises(ShapeError, match="'b'"):
        Global().allocate(RankRequest(SHAPES, keep_ratio=0.5), {**energies, "b": torch.ones(3)})
    with pytest.raises(NonFiniteError, match="'c'"):
        Global().allocate(RankRequest(SHAPES, keep_ratio=0.5), {**energies, "c": torch.full((5,), math.nan)})
    overrides = [LayerOverride("nothing*", rank=1)]
    with pytest.raises(OverrideError):
        Global().allocate(RankRequest(SHAPES, keep_ratio=0.5, overrides=overrides), energies)


@pytest.mark.parametrize("unit", ["parameters", "latency"])
@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_a_budget_that_no_ranks_meet_is_refused_with_the_least_that_some_do(
    unit: str, floor: float, tmp_path: Path
) -> None:
    cost: Measure = Parameters() if unit == "parameters" else latency(tmp_path, SHAPES)
    energies = energies_of(SHAPES)
    with pytest.raises(BudgetError) as caught:
        Global(floor).allocate(RankRequest(SHAPES, keep_ratio=0.01, cost=cost), energies)
    said = re.search(r"Ask for keep_ratio=(\S+) or more", str(caught.value))
    assert said is not None
    least = float(said[1])
    allocation = Global(floor).allocate(RankRequest(SHAPES, keep_ratio=least, cost=cost), energies)
    assert cost_of(allocation, cost) <= least * sum(cost.dense(shape) for shape in SHAPES.values()) + 1e-6
    with pytest.raises(BudgetError):
        Global(floor).allocate(RankRequest(SHAPES, keep_ratio=least * 0.99, cost=cost), energies)


def test_a_cost_table_without_a_shape_is_refused(tmp_path: Path) -> None:
    cost = latency(tmp_path, {"a": SHAPES["a"], "b": SHAPES["b"]})
    with pytest.raises(LatencyTableError, match="no times for the shape 5 x 10, only for 6 x 6, 12 x 4"):
        Global().allocate(RankRequest(SHAPES, keep_ratio=0.5, cost=cost), energies_of(SHAPES))
