"""The same share for every layer, with exceptions by name. m: out_features, n: in_features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lowrank_pl.allocation.measure import Measure, Parameters
from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.arguments import ExclusiveArgumentsError
from lowrank_pl.errors.numerics import BudgetError, RangeError, RatioError
from lowrank_pl.errors.targets import OverrideError
from lowrank_pl.nn import LinearForm, LowRankLinear


@dataclass
class LayerOverride:
    """What some layers get instead of the common share; exactly one of the last three is given.

    Args:
        pattern: Glob over fully qualified names, e.g. `"*.layer.0.*"`. The first override that matches wins.
        keep_ratio: Share of the layer's weights to keep, `0 < keep_ratio <= 1`.
        rank: The rank itself, `1 … min(out, in)`.
        dense: Leave the layers dense.
    """

    pattern: str
    keep_ratio: float | None = None
    rank: int | None = None
    dense: bool = False


@dataclass(frozen=True)
class Allocation:
    """Ranks for layers.

    Attributes:
        shapes: Every targeted layer.
        ranks: Rank per layer, `None` where it stays dense.
        form: Of the factorised layers.
    """

    shapes: dict[str, LinearShape]
    ranks: dict[str, int | None]
    form: type[LinearForm] = LowRankLinear

    def parameters(self, name: str) -> int:
        """Parameters of a layer's weight under this allocation."""
        return self.cost(name, Parameters().in_form(self.form))

    def cost(self, name: str, measure: Measure) -> int:
        """What a layer costs under this allocation, in the unit of a measure."""
        return measure.of(self.shapes[name], self.ranks[name])

    def total_cost(self, measure: Measure) -> int:
        """What all layers cost under this allocation, in the unit of a measure."""
        return sum(self.cost(name, measure) for name in self.shapes)

    @property
    def kept(self) -> int:
        """Parameters of all layers under this allocation."""
        return self.total_cost(Parameters().in_form(self.form))

    @property
    def dense(self) -> int:
        """Parameters of all layers when dense."""
        return Parameters().total_dense(self.shapes)


def floor_cost(shapes: Mapping[str, LinearShape], cost: Measure) -> int:
    """What the layers cost at least: one rank each, or the dense weight where that is cheaper."""
    return sum(min(cost.factored(shape, 1), cost.dense(shape)) for shape in shapes.values())


def uniform_ranks(
    shapes: Mapping[str, LinearShape],
    keep_ratio: float | None = None,
    rank_ratio: float | None = None,
    multiple_of: int = 1,
    overrides: Sequence[LayerOverride] = (),
    cost: Measure | None = None,
) -> Allocation:
    """Gives every layer the same share.

    Args:
        shapes: The targeted layers.
        keep_ratio: Share of what each dense layer costs: in parameters of two factors the largest rank with
            `r (m + n) <= keep_ratio · m n`. At 1 everything stays dense.
        rank_ratio: The papers' measure instead: `r = int(rank_ratio · min(m, n))`.
        multiple_of: Round ranks to a multiple (hardware likes 8 or 16): down, and where the multiple above is nearer
            up, as long as all layers together keep to keep_ratio. A rank below the multiple stays.
        overrides: Exceptions by name; they neither draw from nor add to the other layers' share.
        cost: What ranks cost; parameters by default.

    Returns:
        Ranks; a layer that would cost as much as its dense weight stays dense: in two factors from the break-even rank
        on, in the pivoted form only at the full rank.

    Raises:
        ExclusiveArgumentsError: neither or both of the ratios are given.
        RatioError: a ratio outside `0 < ratio <= 1`, NaN, or a multiple below 1.
        RankError: an override asks for an impossible rank.
        OverrideError: an override matches no layer or does not say exactly one thing.
        BudgetError: the keep_ratio is below what rank 1 everywhere costs.
        LatencyTableError: the cost knows nothing of a layer's shape.
    """
    cost = cost or Parameters()
    check_share(keep_ratio, rank_ratio, multiple_of)
    chosen = _match_overrides(list(shapes), overrides)
    ranks: dict[str, int | None] = {}
    for name, shape in shapes.items():
        override = chosen.get(name)
        if override is None:
            rank = _rank_by_ratio(shape, keep_ratio, rank_ratio, multiple_of, cost)
        elif override.dense:
            rank = None
        elif override.rank is not None:
            shape.check_rank(override.rank, name)
            rank = override.rank
        else:
            rank = _rank_by_ratio(shape, override.keep_ratio, None, multiple_of, cost)
        # At or above break-even the dense weight is cheaper.
        ranks[name] = None if rank is None or rank >= cost.break_even(shape) else rank
    allocation = Allocation(dict(shapes), ranks, cost.form)
    if keep_ratio is not None:
        names = [name for name in shapes if name not in chosen]
        _fit_budget(allocation, keep_ratio, multiple_of, names, cost)
        if multiple_of > 1:
            _round_up(allocation, keep_ratio, multiple_of, names, cost)
    return allocation


def check_share(keep_ratio: float | None, rank_ratio: float | None, multiple_of: int) -> None:
    """Raises `ExclusiveArgumentsError` or `RatioError` unless the arguments of `uniform_ranks` make sense."""
    if (keep_ratio is None) == (rank_ratio is None):
        names = ["keep_ratio", "rank_ratio"]
        raise ExclusiveArgumentsError(names, [] if keep_ratio is None else names, "model.init_args.strategy.init_args")
    for name, ratio in (("keep_ratio", keep_ratio), ("rank_ratio", rank_ratio)):
        if ratio is not None:
            check_ratio(name, ratio)
    if multiple_of < 1:
        raise RangeError("multiple_of", multiple_of, "a whole number from 1")


def _rank_by_ratio(
    shape: LinearShape, keep_ratio: float | None, rank_ratio: float | None, multiple_of: int, cost: Measure
) -> int | None:
    if keep_ratio == 1.0:
        return None
    if keep_ratio is not None:
        rank = cost.largest_rank(shape, keep_ratio * cost.dense(shape) + 1e-6)
    else:
        assert rank_ratio is not None
        rank = int(rank_ratio * shape.full_rank + 1e-9)
    rounded = rank - rank % multiple_of
    return max(1, rounded or rank)


def check_ratio(name: str, ratio: float) -> None:
    """Raises `RatioError` unless `0 < ratio <= 1`."""
    if not (math.isfinite(ratio) and 0 < ratio <= 1):
        raise RatioError(name, ratio)


def _match_overrides(names: list[str], overrides: Sequence[LayerOverride]) -> dict[str, LayerOverride]:
    chosen: dict[str, LayerOverride] = {}
    for override in overrides:
        said = (override.keep_ratio is not None) + (override.rank is not None) + override.dense
        if said != 1:
            raise OverrideError(override.pattern, f"says {said} of keep_ratio, rank and dense, not exactly one", names)
        if override.keep_ratio is not None:
            check_ratio(f"overrides[{override.pattern!r}].keep_ratio", override.keep_ratio)
        matched = [name for name in names if fnmatchcase(name, override.pattern)]
        if not matched:
            raise OverrideError(override.pattern, "matches no targeted layer", names)
        for name in matched:
            chosen.setdefault(name, override)
    return chosen


def _fit_budget(allocation: Allocation, keep_ratio: float, multiple_of: int, names: list[str], cost: Measure) -> None:
    """Takes from the highest ranks what the minimum of one rank elsewhere has overdrawn."""
    shapes = {name: allocation.shapes[name] for name in names}
    dense = cost.total_dense(shapes)
    budget = keep_ratio * dense + 1e-6
    if (floor := floor_cost(shapes, cost)) > budget:
        raise BudgetError(keep_ratio, floor, dense, unit=cost.unit)

    while _spent(allocation, names, cost) > budget:
        highest = max(names, key=lambda name: allocation.ranks[name] or 0)
        rank = allocation.ranks[highest] or 1
        allocation.ranks[highest] = rank - (multiple_of if rank > multiple_of else 1)


def _spent(allocation: Allocation, names: list[str], cost: Measure) -> int:
    return sum(allocation.cost(name, cost) for name in names)


def _round_up(allocation: Allocation, keep_ratio: float, multiple_of: int, names: list[str], cost: Measure) -> None:
    """Gives what rounding down has saved to the layers whose own share lies nearest below the next multiple."""
    shapes, wanted = allocation.shapes, {}
    for name in names:
        rank, shape = allocation.ranks[name], allocation.shapes[name]
        if rank is None or rank % multiple_of or rank + multiple_of >= cost.break_even(shape):
            continue
        missing = cost.factored(shape, rank + multiple_of) - keep_ratio * cost.dense(shape)
        step = cost.factored(shape, rank + multiple_of) - cost.factored(shape, rank)
        if missing <= step / 2:
            wanted[name] = (missing / max(step, 1), step)
    budget = keep_ratio * sum(cost.dense(shapes[name]) for name in names) + 1e-6
    spent = _spent(allocation, names, cost)
    for name, (_, step) in sorted(wanted.items(), key=lambda item: item[1][0]):
        if spent + step <= budget:
            allocation.ranks[name] = (allocation.ranks[name] or 0) + multiple_of
            spent += step
