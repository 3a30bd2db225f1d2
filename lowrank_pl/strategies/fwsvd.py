"""Fisher-weighted SVD of every targeted layer."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from lowrank_pl.allocation import LayerOverride, Measure
from lowrank_pl.core import axis_weighted_svd, relative_error
from lowrank_pl.core.axis_weighted import DEFAULT_DAMPING
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.importance import FisherKind, LayerFisher
from lowrank_pl.strategies.calibration import Calibration
from lowrank_pl.strategies.static import Factorised, StaticStrategy
from lowrank_pl.surgery import TargetSelector


class FWSVD(StaticStrategy):
    """Minimises the reconstruction error weighted by sums of the empirical Fisher information.

    References:
        Hsu et al., Language model compression with weighted low-rank factorization, ICLR 2022 (side `input`).
        The sides `output` and `both` are this project's.

    Args:
        side: `input` weighs by input feature (the paper), `output` by output feature, `both` by their product.
        keep_ratio: Share of what each targeted layer costs to keep, `0 < keep_ratio <= 1`.
        rank_ratio: Instead of keep_ratio, the papers' measure: rank `int(rank_ratio * min(out, in))`.
        multiple_of: Round ranks to multiples, all layers together within keep_ratio.
        overrides: Exceptions for layers by name.
        targets: Which layers to factorise.
        calibration: How importance is measured.
        damping: Added to every importance, relative to the layer's mean importance.
        cost: What keep_ratio is a share of; see `StaticStrategy`.
    """

    fisher_kind = FisherKind.SUMS

    def __init__(
        self,
        side: Literal["input", "output", "both"] = "input",
        keep_ratio: float | None = None,
        rank_ratio: float | None = None,
        multiple_of: int = 1,
        overrides: list[LayerOverride] | None = None,
        targets: TargetSelector | None = None,
        calibration: Calibration | None = None,
        damping: float = DEFAULT_DAMPING,
        cost: Measure | None = None,
    ) -> None:
        super().__init__(keep_ratio, rank_ratio, multiple_of, overrides, targets, calibration, cost)
        if not (math.isfinite(damping) and damping >= 0):
            raise RangeError("damping", damping, "0 <= damping, relative to the mean importance")
        self.side = side
        self.damping = damping

    def factorise(self, weight: Tensor, rank: int, fisher: LayerFisher | None, samples: int) -> Factorised:
        """Weighted SVD by the chosen side."""
        del samples
        assert fisher is not None
        inputs = fisher.input_sums if self.side in ("input", "both") else None
        outputs = fisher.output_sums if self.side in ("output", "both") else None
        factors = axis_weighted_svd(weight, rank, inputs, outputs, damping=self.damping)
        return Factorised(factors, relative_error(weight, factors.product(), inputs, outputs))

    def options(self) -> dict[str, Any]:
        """Adds the side and the damping."""
        return {"side": self.side, **super().options(), "damping": self.damping}
