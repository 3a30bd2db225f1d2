"""Fisher-weighted SVD of every targeted layer."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from lowrank_pl.allocation import Allocator, LayerOverride, Measure
from lowrank_pl.core import axis_weighted_svd, relative_error
from lowrank_pl.core.axis_weighted import DEFAULT_DAMPING
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.importance import FisherSums, Importance, LayerFisher, LayerImportance
from lowrank_pl.nn import FinalForm
from lowrank_pl.strategies.calibration import Calibration
from lowrank_pl.strategies.decomposition import ByRank, Decomposition, Factorised
from lowrank_pl.strategies.fisher_energies import fisher_energies
from lowrank_pl.strategies.recalibration import Recalibration
from lowrank_pl.strategies.refit import Refit
from lowrank_pl.strategies.static import StaticStrategy
from lowrank_pl.surgery import TargetSelector


class FWSVD(StaticStrategy):
    """Minimises the reconstruction error weighted by sums of the empirical Fisher information.

    References:
        Hsu et al., Language model compression with weighted low-rank factorization, ICLR 2022 (side `input`).
        The sides `output` and `both` are this project's.

    Args:
        side: `input` weighs by input feature (the paper), `output` by output feature, `both`, the default, by their
            product: it kept more of the score in every comparison of ours.
        keep_ratio: Share of what each targeted layer costs to keep, `0 < keep_ratio <= 1`.
        rank_ratio: Instead of keep_ratio, the papers' measure: rank `int(rank_ratio * min(out, in))`.
        multiple_of: Round ranks to multiples, all layers together within keep_ratio.
        overrides: Exceptions for layers by name.
        targets: Which layers to factorise.
        calibration: How importance is measured.
        damping: Added to every importance, relative to the layer's mean importance.
        cost: What keep_ratio is a share of; see `StaticStrategy`.
        allocation: Which layer gets which rank; see `StaticStrategy`. `Global` needs side `output` or `both`.
        recalibration: See `StaticStrategy`.
        refit: See `StaticStrategy`.
        form: See `StaticStrategy`.
    """

    def __init__(
        self,
        side: Literal["input", "output", "both"] = "both",
        keep_ratio: float | None = None,
        rank_ratio: float | None = None,
        multiple_of: int = 1,
        overrides: list[LayerOverride] | None = None,
        targets: TargetSelector | None = None,
        calibration: Calibration | None = None,
        damping: float = DEFAULT_DAMPING,
        cost: Measure | None = None,
        allocation: Allocator | None = None,
        recalibration: Recalibration | bool | None = None,
        refit: Refit | bool | None = False,
        form: FinalForm = "low_rank",
    ) -> None:
        if side not in ("input", "output", "both"):
            raise RangeError("side", side, "'input', 'output' or 'both'")
        self.side = side
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
        if not (math.isfinite(damping) and damping >= 0):
            raise RangeError("damping", damping, "0 <= damping, relative to the mean importance")
        self.damping = damping

    @classmethod
    def why_no_embeddings(cls) -> str:
        """Rows of tokens that were not seen would get any values."""
        return "the Fisher information is zero for every token that the calibration samples lack"

    @property
    def importance(self) -> Importance[LayerFisher]:
        """Sums of the Fisher information."""
        return FisherSums()

    def why_no_energies(self) -> str:
        """With weights of inputs alone, ranks would go where inputs are large, not where the loss is."""
        if self.side != "input":
            return ""
        return "weights of inputs alone do not say how much the loss depends on a layer's outputs"

    def decompose(self, weight: Tensor, measured: LayerImportance | None, samples: int) -> Decomposition:
        """Weighted SVD by the chosen side."""
        del samples
        assert isinstance(measured, LayerFisher)
        inputs = measured.input_sums if self.side in ("input", "both") else None
        outputs = measured.output_sums if self.side in ("output", "both") else None

        def factorise(rank: int) -> Factorised:
            factors = axis_weighted_svd(weight, rank, inputs, outputs, damping=self.damping)
            return Factorised(factors, relative_error(weight, factors.product(), inputs, outputs))

        return ByRank(factorise, lambda: fisher_energies(weight, measured, inputs, outputs, self.damping))

    def options(self) -> dict[str, Any]:
        """Adds the side and the damping."""
        return {"side": self.side, **super().options(), "damping": self.damping}
