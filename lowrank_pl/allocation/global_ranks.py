"""Ranks where they save the most loss per unit of cost, over all layers together. m: outputs, n: inputs."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import Tensor

from lowrank_pl.allocation.allocator import Allocator, RankRequest
from lowrank_pl.allocation.measure import Measure, Parameters
from lowrank_pl.allocation.uniform import Allocation
from lowrank_pl.core.checks import check_finite
from lowrank_pl.core.shapes import EmbeddingShape, LinearShape
from lowrank_pl.errors.numerics import RangeError, ShapeError


class Global(Allocator):
    """Gives ranks to the layers in which a unit of cost saves the most energy, from a floor up to dense.

    Energies are by how much the loss rises, to second order, when a singular group is left out, so they compare across
    layers. A layer at its break-even rank becomes dense, which costs no more and keeps everything; the choice between
    the ranks below it and dense is made on the concave envelope of energy over cost, so that a dense layer is found
    although the last rank before it may be a poor bargain by itself.

    Args:
        floor: Every layer gets at least this share of the rank that uniform ranks would give it, `0 <= floor <= 1`:
            energies are estimates, and a layer without any rank is a bet on them. At 1 ranks are uniform, but for what
            rounding leaves.
        vocabulary_floor: The same for a look-up (`targets.embeddings`), whose error reaches every layer and which no
            refit makes up for: its energies understate it.

    References:
        The allocation is this project's; that energies in a Kronecker metric compare across layers follows from the
        second-order expansion of the loss (`lowrank_pl/strategies/README.md`).
    """

    needs_energies: ClassVar[bool] = True

    def __init__(self, floor: float = 0.25, vocabulary_floor: float = 1.0) -> None:
        for name, value in (("floor", floor), ("vocabulary_floor", vocabulary_floor)):
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise RangeError(f"allocation.{name}", value, f"0 <= {name} <= 1, a share of the uniform rank")
        self.floor = floor
        self.vocabulary_floor = vocabulary_floor

    def allocate(self, request: RankRequest, energies: Mapping[str, Tensor]) -> Allocation:
        """Ranks within the budget of the request, from the highest energy per unit of cost downwards.

        Raises:
            ShapeError: a layer without energies, or with another number than its full rank.
            NonFiniteError: an energy is NaN or Inf.
        """
        uniform = request.uniform()
        fixed = {n for n in request.shapes if any(fnmatchcase(n, o.pattern) for o in request.overrides)}
        free = {name: shape for name, shape in request.shapes.items() if name not in fixed}
        choices = {
            name: RankChoice(shape, self._lowest(uniform.ranks[name], shape, request)) for name, shape in free.items()
        }
        chosen = best_ranks(choices, energies, _budget(request, uniform, free), request.multiple_of, request.cost)
        ranks = {n: chosen.get(n, uniform.ranks[n]) for n in request.shapes}
        return Allocation(dict(request.shapes), ranks, uniform.form)

    def _lowest(self, uniform: int | None, shape: LinearShape, request: RankRequest) -> int:
        share = min(request.cost.break_even(shape), shape.full_rank) if uniform is None else uniform
        floor = self.vocabulary_floor if isinstance(shape, EmbeddingShape) else self.floor
        lowest, step = max(1, int(floor * share)), request.multiple_of
        multiple = -(-lowest // step) * step
        return multiple if multiple <= share else lowest


@dataclass(frozen=True)
class RankChoice:
    """What one layer may get.

    Attributes:
        shape: Of its weight.
        low: The lowest rank.
        high: The highest; `None`: every rank below break-even.
        dense: Whether it may be dense instead.
    """

    shape: LinearShape
    low: int = 1
    high: int | None = None
    dense: bool = True


def best_ranks(
    choices: Mapping[str, RankChoice],
    energies: Mapping[str, Tensor],
    budget: float,
    multiple_of: int = 1,
    cost: Measure | None = None,
) -> dict[str, int | None]:
    """The ranks that keep most energy within a budget, `None` for a layer that is dense.

    Args:
        choices: Per layer, what it may get. Its lowest rank is kept even where all together
            cost more than the budget.
        energies: Per layer, by how much the loss rises without each group, `[min(m, n)]`, non-increasing.
        budget: What all layers may cost together, in the unit of `cost`.
        multiple_of: Ranks above the lowest are multiples of it.
        cost: What ranks cost; parameters by default.

    Raises:
        ShapeError: a layer without energies, or with another number than its full rank.
        NonFiniteError: an energy is NaN or Inf.
    """
    cost = cost or Parameters()
    ladders = {}
    for name, choice in choices.items():
        energy, full = energies.get(name), choice.shape.full_rank
        if energy is None or energy.numel() != full:
            given = () if energy is None else tuple(energy.shape)
            raise ShapeError(f"the energies of layer {name!r}", given, f"[{full}]")
        check_finite("an energy", energy, name)
        ladders[name] = _ladder(choice, energy, multiple_of, cost)
    return {name: rung.rank for name, rung in _climb(ladders, budget).items()}


@dataclass(frozen=True)
class _Rung:
    """A rank that a layer may have (`None`: dense), what it costs, and the energy that it keeps."""

    rank: int | None
    cost: int
    energy: float


def _budget(request: RankRequest, uniform: Allocation, free: Mapping[str, LinearShape]) -> float:
    if request.keep_ratio is not None:
        return request.keep_ratio * sum(request.cost.dense(shape) for shape in free.values()) + 1e-6
    return sum(_cost(request.cost, shape, uniform.ranks[name]) for name, shape in free.items())


def _cost(measure: Measure, shape: LinearShape, rank: int | None) -> int:
    return measure.dense(shape) if rank is None else measure.factored(shape, rank)


def _ladder(choice: RankChoice, energy: Tensor, step: int, measure: Measure) -> list[_Rung]:
    """The ranks to choose from, in ascending cost: from the lowest up to break-even, then dense."""
    shape, low = choice.shape, choice.low
    sums = energy.double().clamp(min=0).cumsum(0).tolist()
    dense = _Rung(None, measure.dense(shape), sums[-1])
    high = shape.full_rank if choice.high is None else choice.high
    rungs = [
        _Rung(r, measure.factored(shape, r), sums[r - 1]) for r in range(low, high + 1) if r == low or r % step == 0
    ]
    below = [rung for rung in rungs if rung.cost < dense.cost]
    return [*below, dense] if choice.dense or not below else below


def _envelope(ladder: list[_Rung], start: int, stop: int) -> list[int]:
    """Places of the rungs on the upper concave envelope of energy over cost, from one rung on, before another."""
    hull = [start]
    for place in range(start + 1, stop):
        if ladder[place].cost == ladder[hull[-1]].cost:  # a measured time may not rise with the rank
            if len(hull) == 1:
                hull = [place]
                continue
            hull.pop()
        while len(hull) > 1 and _slope(ladder, hull[-2], place) >= _slope(ladder, hull[-2], hull[-1]):
            hull.pop()
        hull.append(place)
    return hull


def _slope(ladder: list[_Rung], low: int, high: int) -> float:
    return (ladder[high].energy - ladder[low].energy) / (ladder[high].cost - ladder[low].cost)


def _climb(ladders: Mapping[str, list[_Rung]], budget: float) -> dict[str, _Rung]:
    """The best bargains first.

    Along the envelopes the order of bargains is that of falling slopes, which is optimal for the budget at every step.
    For a layer whose step does not fit, dense above all, the envelope is taken anew over the rungs that still do.
    """
    places = {name: _first(ladder) for name, ladder in ladders.items()}
    spent = sum(ladders[name][place].cost for name, place in places.items())
    order = {name: index for index, name in enumerate(ladders)}
    heap: list[tuple[float, int, str]] = []
    hulls: dict[str, list[int]] = {}

    def offer(name: str, hull: list[int]) -> None:
        hulls[name] = hull
        if len(hull) > 1:
            heapq.heappush(heap, (-_slope(ladders[name], hull[0], hull[1]), order[name], name))

    for name, ladder in ladders.items():
        offer(name, _envelope(ladder, places[name], len(ladder)))
    while heap:
        _, _, name = heapq.heappop(heap)
        ladder, here, target = ladders[name], places[name], hulls[name][1]
        rest = budget - spent
        if ladder[target].cost - ladder[here].cost > rest:
            affordable = sum(rung.cost - ladder[here].cost <= rest for rung in ladder)
            offer(name, _envelope(ladder, here, affordable))
            continue
        spent, places[name] = spent + ladder[target].cost - ladder[here].cost, target
        offer(name, hulls[name][1:])
    return {name: ladders[name][place] for name, place in places.items()}


def _first(ladder: list[_Rung]) -> int:
    """The lowest rung; the highest of those that cost the same."""
    return max(place for place, rung in enumerate(ladder) if rung.cost == ladder[0].cost)
