"""Weighted SVD with one weight per input, per output, or both. m: out_features, n: in_features, r: rank."""

from __future__ import annotations

import math

from torch import Tensor

from lowrank_pl.core.checks import check_importance, check_weight
from lowrank_pl.core.factors import Factors
from lowrank_pl.core.precision import double
from lowrank_pl.core.subspace import left_singular_vectors
from lowrank_pl.core.svd import truncated_svd
from lowrank_pl.errors.numerics import RangeError

DEFAULT_DAMPING = 1e-6


def axis_weighted_svd(
    weight: Tensor,
    rank: int,
    input_importance: Tensor | None = None,
    output_importance: Tensor | None = None,
    damping: float = DEFAULT_DAMPING,
) -> Factors:
    """The closed-form minimum of `Σ_ij a_i b_j (W − A B)_ij²` over all `A B` of a rank.

    With `input_importance` alone this is FWSVD; without either it is plain SVD. From
    `svd(D_out W D_in) = U S Vᵀ` the factors follow in projection form, `A = D_out⁻¹ U_r`,
    `B = U_rᵀ D_out W`: nothing is ever divided by an input's importance, so inputs that never mattered
    cost no accuracy. All in float64.

    Args:
        weight: `[m, n]`, finite, any floating dtype.
        rank: `1 … min(m, n)`.
        input_importance: `b [n] >= 0`, the paper's row sums of the Fisher information; `None`: all equal.
        output_importance: `a [m] >= 0`; `None`: all equal.
        damping: Added to each importance *relative to its mean*, `>= 0`: an absolute constant would turn a
            tiny Fisher information into plain SVD. All-zero importances count as all equal.

    Returns:
        Factors in the weight's dtype, `left` and `right` orthonormal, `sigma` the singular values of the
        approximation itself (not of the weighted matrix).

    Raises:
        ShapeError, NonFiniteError, RankError: a bad weight or rank.
        ImportanceError: a negative importance.
        RangeError: a damping that is negative or not finite.

    References:
        Hsu et al., Language model compression with weighted low-rank factorization, ICLR 2022, section 3
        (input side; the paper writes `Y = X W`, so its rows are our inputs). The other sides are this
        project's: the same closed form for any rank-one importance `a bᵀ`.
    """
    shape = check_weight(weight, rank)
    if not (math.isfinite(damping) and damping >= 0):
        raise RangeError("damping", damping, "0 <= damping, relative to the mean importance")
    if input_importance is None and output_importance is None:
        return truncated_svd(weight, rank)
    scale_in = _scale("input_importance", input_importance, shape.in_features, damping)
    scale_out = _scale("output_importance", output_importance, shape.out_features, damping)
    w = double(weight)
    if scale_out is None:
        u = left_singular_vectors(w * scale_in if scale_in is not None else w, rank)
        return Factors.from_projection(u, w).like(weight)
    w_out = scale_out[:, None] * w
    u = left_singular_vectors(w_out * scale_in if scale_in is not None else w_out, rank)
    return Factors.from_product(u / scale_out[:, None], u.mT @ w_out).like(weight)


def _scale(what: str, importance: Tensor | None, size: int, damping: float) -> Tensor | None:
    """`√(importance / mean + damping)`, or `None` where all are equal."""
    if importance is None:
        return None
    check_importance(what, importance, (size,))
    importance = double(importance)
    mean = importance.mean()
    if mean == 0:
        return None
    # A weight of exactly zero on an output would be divided by; one part in 10¹² of the mean is as good.
    return (importance / mean + max(damping, 1e-12)).sqrt()
