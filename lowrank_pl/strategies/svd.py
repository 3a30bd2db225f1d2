"""Truncated SVD of every targeted layer."""

from __future__ import annotations

from torch import Tensor

from lowrank_pl.core import truncated_svd
from lowrank_pl.importance import LayerImportance
from lowrank_pl.strategies.decomposition import ByRank, Decomposition, Factorised
from lowrank_pl.strategies.static import StaticStrategy


class SVD(StaticStrategy):
    """Minimises `‖W − AB‖_F` per layer; needs no data. See `StaticStrategy` for the arguments."""

    @classmethod
    def why_no_embeddings(cls) -> str:
        """Empty: a matrix is a matrix."""
        return ""

    def decompose(self, weight: Tensor, measured: LayerImportance | None, samples: int) -> Decomposition:
        """Truncated SVD."""
        del measured, samples
        return ByRank(lambda rank: Factorised(truncated_svd(weight, rank)))
