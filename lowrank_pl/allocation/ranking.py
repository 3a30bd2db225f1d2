"""Singular groups ranked across all layers, and as many kept as a budget pays for. m: outputs, n: inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lowrank_pl.allocation.measure import Measure, Parameters
from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.numerics import NonFiniteError, RangeError, ShapeError
from lowrank_pl.errors.targets import OverrideError


@dataclass
class RankBounds:
    """How few and how many singular groups some layers may end with.

    Args:
        pattern: Glob over fully qualified names. The first that matches a layer wins.
        low: At least so many, `>= 1`.
        high: At most so many; `null`: no limit.
    """

    pattern: str = "*"
    low: int = 1
    high: int | None = None

    def __post_init__(self) -> None:
        """Raises an error for impossible numbers."""
        if self.low < 1:
            raise RangeError(f"bounds[{self.pattern!r}].low", self.low, "a whole number from 1")
        if self.high is not None and self.high < self.low:
            raise RangeError(f"bounds[{self.pattern!r}].high", self.high, f"low ({self.low}) or more")


def bounds_of(shapes: Mapping[str, LinearShape], bounds: list[RankBounds]) -> dict[str, RankBounds]:
    """The bounds of every layer.

    Raises:
        OverrideError: a pattern matches no layer.
        RankError: a pattern asks for more than a layer's full rank.
    """
    for bound in bounds:
        matched = [name for name in shapes if fnmatchcase(name, bound.pattern)]
        if not matched:
            raise OverrideError(bound.pattern, "matches no targeted layer", list(shapes), "bounds")
        for name in matched:
            shapes[name].check_rank(bound.low, name)
    return {name: next((b for b in bounds if fnmatchcase(name, b.pattern)), RankBounds()) for name in shapes}


@dataclass(frozen=True)
class Cost:
    """What ranks cost.

    Attributes:
        allow_dense: Whether a layer at or above its break-even rank may end as a dense weight, which then is cheaper.
        measure: In which unit.
    """

    allow_dense: bool = False
    measure: Measure = field(default_factory=Parameters)

    def of(self, shape: LinearShape, rank: int) -> int:
        """Of a layer at a rank."""
        factored = self.measure.factored(shape, rank)
        return min(factored, self.measure.dense(shape)) if self.allow_dense else factored

    def total(self, shapes: Mapping[str, LinearShape], ranks: Mapping[str, int]) -> int:
        """Of all layers."""
        return sum(self.of(shape, ranks[name]) for name, shape in shapes.items())


def globally_ranked(
    scores: Mapping[str, Tensor],
    shapes: Mapping[str, LinearShape],
    budget: float,
    bounds: Mapping[str, RankBounds] | None = None,
    per_parameter: bool = False,
    cost: Cost | None = None,
) -> dict[str, Tensor]:
    """Keeps the groups with the highest scores of all layers together, strictly within a budget.

    Every layer first gets its best `low` groups. The others follow in the order of their scores, ties in the order of
    layers and groups, each if the budget still pays for it.

    Args:
        scores: Per layer, one score per group that there still is, `[c]`.
        shapes: Of the same layers.
        budget: What all groups kept may cost together, in the unit of `cost`.
        bounds: Of layers by name; one to all groups otherwise.
        per_parameter: Rank by score divided by what a group of its layer costs: `m + n` parameters, or the mean over
            the layer's groups in another unit.
        cost: What ranks cost.

    Returns:
        Per layer the indices of the groups to keep, ascending, on the CPU.

    Raises:
        ShapeError: scores and shapes are of different layers, or a layer has no group.
        NonFiniteError: a score is NaN or Inf.
        RangeError: the budget does not pay for the lowest ranks.
    """
    if scores.keys() != shapes.keys() or any(score.numel() == 0 for score in scores.values()):
        raise ShapeError("scores", (len(scores),), f"one non-empty score per layer, {len(shapes)} layers")
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise NonFiniteError("the score of singular groups", int((~torch.isfinite(score)).sum()), name)
    cost = cost or Cost()
    chosen: dict[str, list[int]] = {}
    candidates: list[tuple[float, str, int]] = []
    for name, score in scores.items():
        bound = (bounds or {}).get(name, RankBounds())
        values = score.detach().cpu().double()
        order = torch.sort(values, descending=True, stable=True).indices.tolist()
        chosen[name] = order[: bound.low]
        scale = cost.measure.per_rank(shapes[name]) if per_parameter else 1
        candidates += [(float(values[index]) / scale, name, index) for index in order[bound.low : bound.high]]
    spent = cost.total(shapes, {name: len(order) for name, order in chosen.items()})
    if spent > budget:
        raise RangeError("budget", budget, f"at least {spent:,} {cost.measure.unit}, what the lowest ranks cost")
    # Python's sort is stable: equal scores stay in the order of layers and groups, so ties never empty a layer.
    for _, name, index in sorted(candidates, key=lambda candidate: -candidate[0]):
        rank = len(chosen[name])
        price = cost.of(shapes[name], rank + 1) - cost.of(shapes[name], rank)
        if spent + price <= budget:
            chosen[name].append(index)
            spent += price
    return {name: torch.tensor(sorted(order)) for name, order in chosen.items()}


def rounded(
    kept: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    shapes: Mapping[str, LinearShape],
    budget: float,
    multiple_of: int,
    bounds: Mapping[str, RankBounds] | None = None,
    cost: Cost | None = None,
) -> dict[str, Tensor]:
    """Brings ranks to multiples (hardware likes 8 or 16) without leaving the budget.

    Every rank goes down to a multiple; what that frees pays for whole multiples again, where the groups next in line
    have the highest scores per unit of cost. A rank stays where the multiple is below its lowest, or
    the layer ends dense.

    Args:
        kept: Groups per layer, as `globally_ranked` returns them.
        scores: The scores that they were chosen by.
        shapes: Of the same layers.
        budget: In the unit of `cost`.
        multiple_of: `>= 1`.
        bounds: Of layers by name.
        cost: What ranks cost.
    """
    cost = cost or Cost()
    orders = {name: torch.sort(s.detach().cpu().double(), descending=True, stable=True) for name, s in scores.items()}
    ranks = {}
    for name, indices in kept.items():
        rank, low = len(indices), (bounds or {}).get(name, RankBounds()).low
        down = rank - rank % multiple_of
        ends_dense = cost.allow_dense and rank >= cost.measure.break_even(shapes[name])
        ranks[name] = rank if down < low or ends_dense else down
    spent = cost.total(shapes, ranks)
    while True:
        best, price, gain = None, 0, -1.0
        for name, rank in ranks.items():
            more = rank + multiple_of - rank % multiple_of
            high = (bounds or {}).get(name, RankBounds()).high
            if more > min(orders[name].values.numel(), high or more):
                continue
            extra = cost.of(shapes[name], more) - cost.of(shapes[name], rank)
            worth = float(orders[name].values[rank:more].sum()) / max(extra, 1)
            if spent + extra <= budget and worth > gain:
                best, price, gain = name, extra, worth
        if best is None:
            break
        ranks[best] += multiple_of - ranks[best] % multiple_of
        spent += price
    return {name: orders[name].indices[:rank].sort().values for name, rank in ranks.items()}
