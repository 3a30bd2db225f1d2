"""Element-wise Fisher-weighted factorisation of every targeted layer."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lowrank_pl.allocation import Allocator, LayerOverride, Measure
from lowrank_pl.core.axis_weighted import DEFAULT_DAMPING
from lowrank_pl.core.elementwise import ElementwiseSolver, PreconditionedLBFGS, shrink_importance, weighted_low_rank
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.importance import FullFisher, Importance, LayerFisher, LayerImportance
from lowrank_pl.nn import FinalForm
from lowrank_pl.strategies.calibration import Calibration
from lowrank_pl.strategies.decomposition import ByRank, Decomposition, Factorised
from lowrank_pl.strategies.fisher_energies import fisher_energies
from lowrank_pl.strategies.recalibration import Recalibration
from lowrank_pl.strategies.refit import Refit
from lowrank_pl.strategies.static import StaticStrategy
from lowrank_pl.surgery import TargetSelector

_HALF_AT = 64
"""Calibration samples at which an importance is as much noise as it is more than rank one."""


class TFWSVD(StaticStrategy):
    """Minimises the reconstruction error weighted by the empirical Fisher information of each single weight.

    References:
        Hua et al., Numerical optimizations for weighted low-rank estimation on language models, EMNLP 2022 (the
        objective; the default solver and the shrinkage are this project's).

    Args:
        solver: How the objective is minimised, from the best closed form on.
        keep_ratio: Share of what each targeted layer costs to keep, `0 < keep_ratio <= 1`.
        rank_ratio: Instead of keep_ratio, the papers' measure: rank `int(rank_ratio * min(out, in))`.
        multiple_of: Round ranks to multiples, all layers together within keep_ratio.
        overrides: Exceptions for layers by name.
        targets: Which layers to factorise.
        calibration: How importance is measured.
        shrinkage: Share of the importance that is replaced by its two-sided (rank-one) approximation, from 0 (none)
            to 1 (all: the closed form of FWSVD with side `both`); steadies an importance from few samples. By default
            `64 / (64 + samples)`, which is near the best on held-out samples for 64 to 1833 calibration samples of MRPC
            (`docs/tfwsvd.md`).
        cost: What keep_ratio is a share of; see `StaticStrategy`.
        allocation: Which layer gets which rank; see `StaticStrategy`. `Global` takes the energies of the closed form
            with both sides.
        recalibration: See `StaticStrategy`.
        refit: See `StaticStrategy`.
        form: See `StaticStrategy`.
    """

    def __init__(
        self,
        solver: ElementwiseSolver | None = None,
        keep_ratio: float | None = None,
        rank_ratio: float | None = None,
        multiple_of: int = 1,
        overrides: list[LayerOverride] | None = None,
        targets: TargetSelector | None = None,
        calibration: Calibration | None = None,
        shrinkage: float | None = None,
        cost: Measure | None = None,
        allocation: Allocator | None = None,
        recalibration: Recalibration | bool | None = None,
        refit: Refit | bool | None = False,
        form: FinalForm = "low_rank",
    ) -> None:
        super().__init__(
            keep_ratio,
            rank_ratio,
            multiple_of,
            overrides,
            targets,
            calibration,
            cost,
            allocation,
            recalibration,
            refit,
            form,
        )
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise RangeError("shrinkage", shrinkage, "0 <= shrinkage <= 1, the share that is replaced")
        self.solver = solver or PreconditionedLBFGS()
        self.shrinkage = shrinkage

    @classmethod
    def why_no_embeddings(cls) -> str:
        """Rows of tokens that were not seen would get any values."""
        return "the Fisher information of every weight is zero for every token that the calibration samples lack"

    @property
    def importance(self) -> Importance[LayerFisher]:
        """The whole Fisher information."""
        return FullFisher()

    def why_no_energies(self) -> str:
        """It can: the closed form with both sides is a good estimate."""
        return ""

    def decompose(self, weight: Tensor, measured: LayerImportance | None, samples: int) -> Decomposition:
        """The solver's best iterate; its weighted error is that of the importance after shrinkage."""
        assert isinstance(measured, LayerFisher)
        assert measured.full is not None
        importance = shrink_importance(measured.full, self.shrinkage_for(samples))

        def factorise(rank: int) -> Factorised:
            result = weighted_low_rank(weight, importance, rank, self.solver)
            return Factorised(result.factors, math.sqrt(result.loss), result.losses, result.reason)

        sums = (measured.input_sums, measured.output_sums)
        return ByRank(factorise, lambda: fisher_energies(weight, measured, *sums, DEFAULT_DAMPING))

    def shrinkage_for(self, samples: int) -> float:
        """The shrinkage for a number of calibration samples."""
        if self.shrinkage is not None:
            return self.shrinkage
        return _HALF_AT / (_HALF_AT + samples)

    def options(self) -> dict[str, Any]:
        """Adds the solver with its numbers, and the shrinkage."""
        numbers = {name: value for name, value in vars(self.solver).items() if not name.startswith("_")}
        solver = {"class": type(self.solver).__name__, **numbers}
        return {"solver": solver, **super().options(), "shrinkage": self.shrinkage}
