"""Plain truncated SVD of one weight. m: out_features, n: in_features, r: rank."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_pl.core.checks import check_weight
from lowrank_pl.core.factors import Factors


def truncated_svd(weight: Tensor, rank: int) -> Factors:
    """The best approximation of a rank in the Frobenius norm: `min ‖W − A B‖_F`.

    Computed in float64 whatever the dtype of the weight: half precisions have no SVD, and float32 loses the
    small groups of an ill-conditioned weight.

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
    u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return Factors(u[:, :rank].contiguous(), sigma[:rank].contiguous(), vh[:rank].contiguous()).to(weight.dtype)


def singular_values(weight: Tensor) -> Tensor:
    """All `min(m, n)` singular values, non-increasing, float64."""
    check_weight(weight)
    sigma: Tensor = torch.linalg.svdvals(weight.double())
    return sigma
