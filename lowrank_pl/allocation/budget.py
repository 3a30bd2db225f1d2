"""What the targeted weights may cost, however the user says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowrank_pl.allocation.measure import Measure, Parameters
from lowrank_pl.allocation.uniform import check_ratio, floor_cost
from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.numerics import BudgetError, BudgetUnitError, RangeError
from lowrank_pl.errors.run import MissingArgumentError


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
        """Refuses none, several, and impossible numbers."""
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            raise MissingArgumentError(
                "exactly one of keep_ratio, parameters and model_parameters",
                f"Given: {', '.join(given) or 'none'}. Set one of them in model.init_args.strategy.init_args.",
            )
        if self.keep_ratio is not None:
            check_ratio("keep_ratio", self.keep_ratio)
        for name in ("parameters", "model_parameters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RangeError(name, value, "a whole number from 1")

    def resolve(self, shapes: Mapping[str, LinearShape], untargeted: int, cost: Measure | None = None) -> int:
        """What the targeted weights may cost.

        Args:
            shapes: The targeted layers.
            untargeted: Parameters of the model outside the targeted weights.
            cost: In which unit; parameters by default.

        Raises:
            BudgetError: less than one singular group per targeted layer, or, for `model_parameters`, less than what
                is not targeted.
            BudgetUnitError: a number of parameters, and a cost in another unit.
        """
        cost = cost or Parameters()
        dense = sum(cost.dense(shape) for shape in shapes.values())
        name, value = next((name, value) for name, value in vars(self).items() if value is not None)
        if name != "keep_ratio" and not isinstance(cost, Parameters):
            raise BudgetUnitError(name, cost.unit)
        asked = {
            "keep_ratio": int((self.keep_ratio or 0) * dense + 1e-6),
            "parameters": self.parameters or 0,
            "model_parameters": (self.model_parameters or 0) - untargeted,
        }[name]
        floor = floor_cost(shapes, cost)
        if asked < floor:
            outside = untargeted if self.model_parameters is not None else 0
            raise BudgetError(value, floor / dense, floor, dense, name, outside, cost.unit)
        return asked
