"""A weight for the inputs that a layer gets from factorised predecessors. m: outputs, n: inputs, t: tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.core.checks import check_finite, check_weight
from lowrank_pl.core.precision import double
from lowrank_pl.errors.numerics import RangeError, ShapeError


@dataclass(frozen=True)
class PairedSums:
    """Sums over the tokens of a layer: `x` is what it gets in the dense model, `z` what it gets in another.

    Attributes:
        cross: `Σ x zᵀ`, `[n, n]`.
        gram: `Σ z zᵀ`, `[n, n]`.
        x: `Σ x`, `[n]`.
        z: `Σ z`, `[n]`.
        tokens: `t`, a scalar.
    """

    cross: Tensor
    gram: Tensor
    x: Tensor
    z: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Compensated:
    """What is to be decomposed in the place of a weight, and in which metric.

    Attributes:
        weight: `M [m, n]`, float64.
        moment: `C`, of the inputs, `[n, n]`, float64.
        x: Mean of `x`, `[n]`; `None` where the layer has no bias.
        z: Mean of `z`, `[n]`; the same.
    """

    weight: Tensor
    moment: Tensor
    x: Tensor | None = None
    z: Tensor | None = None

    def shift(self, dense: Tensor, product: Tensor) -> Tensor | None:
        """What is added to the bias when `product [m, n]` takes the place of `dense [m, n]`; `None` without a bias."""
        if self.x is None or self.z is None:
            return None
        return double(dense) @ self.x - double(product) @ self.z


def compensate(weight: Tensor, sums: PairedSums, ridge: float, bias: bool) -> Compensated:
    """Minimises `Σ ‖W x − M z‖² + ridge · tr((M − W) diag(Σ z zᵀ) (M − W)ᵀ)` over `M`.

    The approximation of rank `r` of `M` in the metric of `z`'s second moment is then the one whose outputs on `z` are
    closest to those of the dense layer on `x`: what is left over of `W x` does not depend on `z`. Where `z = x`, `M`
    is `W`. With a bias everything is taken from the means, which the bias makes up for.

    Args:
        weight: `W [m, n]`.
        sums: Of the layer.
        ridge: Relative to the diagonal of `Σ z zᵀ`, `> 0`: how strongly `M` keeps to `W` where samples say little.
        bias: Whether the layer has one.

    Raises:
        ShapeError, NonFiniteError, RangeError: bad inputs.
    """
    shape = check_weight(weight)
    if not (math.isfinite(ridge) and ridge > 0):
        raise RangeError("ridge", ridge, "0 < ridge, relative to the diagonal")
    for name in ("cross", "gram"):
        given = getattr(sums, name)
        if tuple(given.shape) != (shape.in_features,) * 2:
            raise ShapeError(name, tuple(given.shape), f"[{shape.in_features}, {shape.in_features}]")
        check_finite(name, given)
    count = double(sums.tokens).clamp(min=1)
    cross, gram = double(sums.cross) / count, double(sums.gram) / count
    x, z = double(sums.x) / count, double(sums.z) / count
    if bias:
        cross, gram = cross - torch.outer(x, z), gram - torch.outer(z, z)
    # A direction that is always zero would be divided by; its column stays as it is.
    pull = torch.where(gram.diagonal() > 0, ridge * gram.diagonal(), 1.0)
    w = double(weight)
    # `W + W (X − Z) (Z + D)⁻¹`: exactly `W` where nothing has changed.
    change: Tensor = torch.linalg.solve(gram + torch.diag(pull), (cross - gram).mT).mT
    return Compensated(w + w @ change, gram, *((x, z) if bias else (None, None)))
