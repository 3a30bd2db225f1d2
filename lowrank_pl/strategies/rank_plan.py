"""What reallocation has to keep to: shapes, starting ranks, bounds, costs and the budget. No training in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from lowrank_pl.allocation import Budget, Cost, RankBounds, RankChoice, best_ranks, globally_ranked, rounded
from lowrank_pl.allocation.ranking import bounds_of
from lowrank_pl.core import LinearShape
from lowrank_pl.core.checks import check_finite
from lowrank_pl.errors.budget import BudgetAboveStartError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.nn import dense_weight
from lowrank_pl.surgery import LayerRecord, TargetSelector


@dataclass(frozen=True)
class RankPlan:
    """The frame of one run.

    Attributes:
        budget: What the targeted weights may cost in the end, in the unit of `cost`.
        shapes: The targeted layers.
        capacities: Singular groups per layer at the start.
        bounds: How few and how many groups each layer may end with.
        cost: What ranks cost.
    """

    budget: int = 0
    shapes: Mapping[str, LinearShape] = field(default_factory=dict)
    capacities: Mapping[str, int] = field(default_factory=dict)
    bounds: Mapping[str, RankBounds] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    @classmethod
    def of(
        cls,
        encoder: nn.Module,
        targets: TargetSelector,
        budget: Budget,
        bounds: list[RankBounds],
        start_ratio: float,
        cost: Cost,
    ) -> RankPlan:
        """The plan for an encoder; changes nothing.

        Raises:
            NoTargetError, TiedWeightError, OverrideError, RankError: a bad choice of layers or bounds.
            NonFiniteError: a targeted weight contains NaN or Inf.
            BudgetError: the budget is below what one rank per layer, or the bounds, cost.
            RangeError: it is above what the dense model has, or a bound is above the starting rank.
            BudgetAboveStartError: there would be nothing to prune.
            BudgetUnitError, LatencyTableError: a cost that does not fit the budget or the layers.
        """
        layers = targets.select(encoder)
        shapes = targets.shapes(layers)
        dense = sum(shape.dense_params for shape in shapes.values())
        capacities = {name: max(1, int(start_ratio * s.full_rank + 1e-9)) for name, s in shapes.items()}
        bounded = bounds_of(shapes, bounds)
        for name, bound in bounded.items():
            if bound.low > capacities[name]:
                allowed = f"at most {capacities[name]}, with which {name!r} starts at start_ratio={start_ratio!r}"
                raise RangeError(f"bounds[{bound.pattern!r}].low", bound.low, allowed)
        lowest = {name: bound.low for name, bound in bounded.items()}
        resolved = budget.resolve(shapes, sum(p.numel() for p in encoder.parameters()) - dense, cost, lowest)
        for name, linear in layers.items():
            check_finite("the weight", dense_weight(linear), name)
        plan = cls(resolved, shapes, capacities, bounded, cost)
        if resolved > plan.start_cost:
            raise BudgetAboveStartError(resolved, plan.start_cost, start_ratio, cost.measure.unit)
        return plan

    @property
    def start_cost(self) -> int:
        """Of the targeted weights at the start."""
        return self.kept(self.capacities)

    @property
    def dense_cost(self) -> int:
        """Of the targeted weights when dense."""
        return sum(self.cost.measure.dense(shape) for shape in self.shapes.values())

    def kept(self, ranks: Mapping[str, int]) -> int:
        """What the targeted weights cost at some ranks."""
        return self.cost.total(self.shapes, ranks)

    def choose(
        self, scores: Mapping[str, Tensor], budget: float, per_parameter: bool, final: bool, multiple_of: int
    ) -> dict[str, Tensor]:
        """The groups to keep; upper bounds are for the end.

        Multiples are kept to on the way as well: no rank rises again, so that ranks in between would end below them.

        Raises:
            NonFiniteError: a score is NaN or Inf.
        """
        bounds = self.bounds if final else {name: RankBounds(low=bound.low) for name, bound in self.bounds.items()}
        kept = globally_ranked(scores, self.shapes, budget, bounds, per_parameter, self.cost)
        if multiple_of > 1:
            kept = rounded(kept, scores, self.shapes, budget, multiple_of, bounds, self.cost)
        return kept

    def best(
        self,
        energies: Mapping[str, Tensor],
        budget: float,
        present: Mapping[str, int],
        floor: float,
        final: bool,
        multiple_of: int,
        ends_dense: bool,
    ) -> dict[str, int]:
        """The ranks that keep most energy, none above the present one; the full rank where a layer stays dense.

        Args:
            energies: Per layer, of its groups, `[min(m, n)]`, non-increasing.
            budget: What all layers may cost together.
            present: The ranks that there are; the full rank where a layer is dense.
            floor: Share of the rank that uniform ranks would give a layer, which it keeps at least.
            final: Whether upper bounds count.
            multiple_of: Of which ranks are multiples, also on the way: no rank rises again.
            ends_dense: Whether a layer that is dense may stay so.

        Raises:
            NonFiniteError: an energy is NaN or Inf.
        """
        measure, share = self.cost.measure, budget / self.dense_cost
        choices = {}
        for name, shape in self.shapes.items():
            bound, dense = self.bounds[name], present[name] == shape.full_rank
            room = room_of(shape)
            highest = min(room, present[name], (bound.high if final else None) or room)
            uniform = measure.largest_rank(shape, share * measure.dense(shape))
            lowest = min(int(floor * uniform), highest)
            multiple = -(-lowest // multiple_of) * multiple_of
            lowest = max(bound.low, multiple if multiple <= min(uniform, highest) else lowest)
            unbounded = not final or bound.high is None or bound.high >= shape.full_rank
            # A lowest rank above the highest leaves dense as the only choice.
            choices[name] = RankChoice(shape, lowest, highest, dense and ends_dense and unbounded)
        least = {name: choice.low for name, choice in choices.items()}
        if self.kept(least) > budget:  # bounds leave no room for the floor
            choices = {n: replace(c, low=self.bounds[n].low) for n, c in choices.items()}
        ranks = best_ranks(choices, energies, budget, multiple_of, measure)
        return {name: self.shapes[name].full_rank if rank is None else rank for name, rank in ranks.items()}

    def dense_layers(self, ranks: Mapping[str, int]) -> list[str]:
        """The layers that end dense at some ranks."""
        if not self.cost.allow_dense:
            return []
        return [name for name, rank in ranks.items() if rank >= self.cost.measure.break_even(self.shapes[name])]

    def records(self, ranks: Mapping[str, int]) -> tuple[LayerRecord, ...]:
        """The layers as a report shows them."""
        dense = set(self.dense_layers(ranks))
        return tuple(
            LayerRecord.of(name, self.shapes[name], None if name in dense else rank, self.cost.measure.form)
            for name, rank in ranks.items()
        )


def room_of(shape: LinearShape) -> int:
    """The highest rank whose factors have no more numbers than the weight, and so fit into its place."""
    return shape.dense_params // shape.factored_params(1)
