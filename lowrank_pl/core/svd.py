"""Plain truncated SVD of one weight. m: out_features, n: in_features, r: rank."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_pl.core.checks import check_weight
from lowrank_pl.core.factors import Factors
from lowrank_pl.core.precision import double
from lowrank_pl.core.subspace import left_singular_vectors


def truncated_svd(weight: Tensor, rank: int) -> Factors:
    """The best approximation of a rank in the Frobenius norm: `min ‖W − A B‖_F`.

    Computed in float64 whatever the dtype of the weight: half precisions have no SVD, and float32 loses the
    small groups of an ill-conditioned weight. A truncation needs one half of the singular vectors alone, which
    `left_singular_vectors` finds.

    Args:
        weight: `[m, n]`, finite, any floating dtype.
        rank: `1 … min(m, n)`.

    Returns:
        Factors of that rank in the weight's dtype, `left` and `right` orthonormal.

    Raises:
        ShapeError, NonFiniteError, RankError: see `check_weight`.

    References:
        Eckart and Young (1936), The approximation of one matrix by another of lower rank.
    """
    check_weight(weight, rank)
    w = double(weight)
    if rank < min(w.shape):
        return Factors.from_projection(left_singular_vectors(w, rank), w).like(weight)
    return Factors(*torch.linalg.svd(w, full_matrices=False)).like(weight)


def singular_values(weight: Tensor) -> Tensor:
    """All `min(m, n)` singular values, non-increasing, float64."""
    check_weight(weight)
    sigma: Tensor = torch.linalg.svdvals(double(weight))
    return sigma
