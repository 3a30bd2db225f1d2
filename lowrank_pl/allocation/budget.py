"""How many parameters the targeted weights may cost, however the user says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowrank_pl.allocation.uniform import check_ratio, floor_parameters
from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.numerics import BudgetError, RangeError
from lowrank_pl.errors.run import MissingArgumentError


@dataclass
class Budget:
    """What may be kept; exactly one is given.

    Args:
        keep_ratio: Share of the targeted weights, in parameters, `0 < keep_ratio <= 1`.
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

    def resolve(self, shapes: Mapping[str, LinearShape], untargeted: int) -> int:
        """Parameters that the targeted weights may cost.

        Args:
            shapes: The targeted layers.
            untargeted: Parameters of the model outside the targeted weights.

        Raises:
            BudgetError: less than one singular group per targeted layer, or, for `model_parameters`, less than what
                is not targeted.
        """
        dense = sum(shape.dense_params for shape in shapes.values())
        if self.keep_ratio is not None:
            asked, name, value = int(self.keep_ratio * dense + 1e-6), "keep_ratio", self.keep_ratio
        elif self.parameters is not None:
            asked, name, value = self.parameters, "parameters", self.parameters
        else:
            assert self.model_parameters is not None
            asked, name, value = self.model_parameters - untargeted, "model_parameters", self.model_parameters
        floor = floor_parameters(shapes)
        if asked < floor:
            outside = untargeted if self.model_parameters is not None else 0
            raise BudgetError(value, floor / dense, floor, dense, name, outside)
        return asked
