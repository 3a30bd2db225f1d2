"""Truncated SVD of every targeted layer."""

from __future__ import annotations

from torch import Tensor

from lowrank_pl.core import truncated_svd
from lowrank_pl.importance import LayerFisher
from lowrank_pl.strategies.static import Factorised, StaticStrategy


class SVD(StaticStrategy):
    """Minimises `‖W − AB‖_F` per layer; needs no data. See `StaticStrategy` for the arguments."""

    def factorise(self, weight: Tensor, rank: int, fisher: LayerFisher | None, samples: int) -> Factorised:
        """Truncated SVD; the Fisher information plays no part."""
        del fisher, samples
        return Factorised(truncated_svd(weight, rank))
