"""What the targeted weights may cost, however the user says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowrank_pl.allocation.measure import Parameters
from lowrank_pl.allocation.ranking import Cost
from lowrank_pl.allocation.uniform import check_ratio
from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.arguments import ExclusiveArgumentsError
from lowrank_pl.errors.numerics import BudgetError, BudgetUnitError, RangeError


@dataclass
class Budget:
    """What may be kept; exactly one is given.

    Args:
        keep_ratio: Share of what the targeted weights cost when dense, `0 < keep_ratio <= 1`.
        parameters: Parameters of the targeted weights.
        model_parameters: Parameters of the whole model, with everything that is not targeted.
    """

    keep_ratio: float | None = None
    parameters: int | None = None
    model_parameters: int | None = None

    def __post_init__(self) -> None:
        """Raises an error for none, several, and impossible numbers."""
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            raise ExclusiveArgumentsError(list(vars(self)), given, "model.init_args.strategy.init_args")
        if self.keep_ratio is not None:
            check_ratio("keep_ratio", self.keep_ratio)
        for name in ("parameters", "model_parameters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RangeError(name, value, "a whole number from 1")

    def resolve(
        self,
        shapes: Mapping[str, LinearShape],
        untargeted: int,
        cost: Cost | None = None,
        lowest: Mapping[str, int] | None = None,
    ) -> int:
        """What the targeted weights may cost.

        Args:
            shapes: The targeted layers.
            untargeted: Parameters of the model outside the targeted weights.
            cost: What ranks cost; in parameters, every layer in two factors, by default.
            lowest: The rank that each layer keeps at least; 1 by default.

        Raises:
            BudgetError: less than what the lowest ranks cost, or, for `model_parameters`, less than that and what is
                not targeted.
            RangeError: more parameters than the dense model has.
            BudgetUnitError: a number of parameters, and a cost in another unit.
        """
        cost = cost or Cost()
        measure = cost.measure
        lowest = dict.fromkeys(shapes, 1) if lowest is None else lowest
        dense = measure.total_dense(shapes)
        name, value = next((name, value) for name, value in vars(self).items() if value is not None)
        if name != "keep_ratio" and not isinstance(measure, Parameters):
            raise BudgetUnitError(name, measure.unit)
        outside = untargeted if name == "model_parameters" else 0
        if name != "keep_ratio" and value > dense + outside:
            whole = "the dense model has" if outside else "the targeted weights have when dense"
            raise RangeError(name, value, f"at most {dense + outside:,}, what {whole}")
        asked = int(value * dense + 1e-6) if name == "keep_ratio" else value - outside
        floor = cost.total(shapes, lowest)
        if asked < floor:
            raised = {layer: rank for layer, rank in lowest.items() if rank > 1}
            dearest = max(raised, key=lambda layer: cost.of(shapes[layer], raised[layer]), default=None)
            bound = "" if dearest is None else f", e.g. rank {raised[dearest]} in {dearest!r}"
            raise BudgetError(value, floor, dense, name, outside, measure.unit, bound)
        return asked
