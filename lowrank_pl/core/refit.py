"""A left factor fitted to what really comes in: inputs of a factorised model. m: outputs, n: inputs, r: rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_pl.core.checks import check_finite, check_weight
from lowrank_pl.core.precision import double
from lowrank_pl.errors.numerics import RangeError, ShapeError

DEFAULT_RIDGE = 1e-3


def refit_left(weight: Tensor, left: Tensor, cross: Tensor, gram: Tensor, ridge: float = DEFAULT_RIDGE) -> Tensor:
    """Minimises `Σ ‖W x − A z‖² + ridge · tr((A − A₀) diag(Σ z zᵀ) (A − A₀)ᵀ)` over `A`.

    `x` is what a layer gets in the dense model and `z = B x̃` what the right factor makes of the same token in the
    factorised one. Any fixed metric of the outputs drops out, because `A` is free. Where `x̃ = x`, the left factor of
    `kronecker_svd` and of its special cases is the minimum already; what is repaired is what the layers before have
    changed.

    Args:
        weight: `W [m, n]`.
        left: `A₀ [m, r]`, the present factor: what samples do not decide stays as it is.
        cross: `Σ x zᵀ`, `[n, r]`.
        gram: `Σ z zᵀ`, `[r, r]`.
        ridge: Relative to the diagonal of `gram`, `> 0`.

    Returns:
        `A [m, r]` in the dtype of `left`, computed in float64.

    Raises:
        ShapeError, NonFiniteError, RangeError: bad inputs.
    """
    shape = check_weight(weight)
    rank = left.shape[-1]
    if not (math.isfinite(ridge) and ridge > 0):
        raise RangeError("ridge", ridge, "0 < ridge, relative to the diagonal")
    expected = {
        "left": (left, (shape.out_features, rank)),
        "cross": (cross, (shape.in_features, rank)),
        "gram": (gram, (rank, rank)),
    }
    for name, (tensor, size) in expected.items():
        if tuple(tensor.shape) != size:
            raise ShapeError(name, tuple(tensor.shape), str(list(size)))
        check_finite(name, tensor)
    z, present = double(gram), double(left)
    # A direction that is always zero would be divided by; its column stays as it is.
    pull = torch.where(z.diagonal() > 0, ridge * z.diagonal(), 1.0)
    wanted = double(weight) @ double(cross) + present * pull
    found: Tensor = torch.linalg.solve(z + torch.diag(pull), wanted.mT).mT
    return found.to(left)
