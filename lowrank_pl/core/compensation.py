"""A weight for the inputs that a layer gets from factorised predecessors. m: outputs, n: inputs, t: tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.core.checks import check_finite
from lowrank_pl.core.precision import double
from lowrank_pl.errors.numerics import RangeError, ShapeError


@dataclass(frozen=True)
class PairedSums:
    """Sums over the tokens of a layer: `x` is what it gets in the dense model, `z` what it gets in another.

    Attributes:
        gram: `Σ z zᵀ`, `[n, n]`.
        cross: `Σ x zᵀ`, `[n, n]`; `None` where `x` is not known or does not count.
        x: `Σ x`, `[n]`; not looked at without `cross`.
        z: `Σ z`, `[n]`; the same.
        tokens: `t`, a scalar.
    """

    gram: Tensor
    cross: Tensor | None
    x: Tensor
    z: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Compensation:
    """How the weights of layers with one input are changed before they are decomposed, and in which metric.

    Attributes:
        moment: `C`, the second moment of `z`, `[n, n]`, float64.
        change: `[n, n]`, float64; `None` for none.
        x: Mean of `x`, `[n]`; `None` where no bias makes up for it.
        z: Mean of `z`, `[n]`; the same.
    """

    moment: Tensor
    change: Tensor | None = None
    x: Tensor | None = None
    z: Tensor | None = None

    def weight(self, dense: Tensor) -> Tensor:
        """`M [m, n]` for a dense weight, float64."""
        w = double(dense)
        return w if self.change is None else w + w @ self.change

    def shift(self, dense: Tensor, product: Tensor) -> Tensor | None:
        """What is added to the bias when `product [m, n]` takes the place of `dense [m, n]`; `None` without a bias."""
        if self.x is None or self.z is None:
            return None
        return double(dense) @ self.x - double(product) @ self.z


def compensation(sums: PairedSums, ridge: float, bias: bool) -> Compensation:
    """Minimises `Σ ‖W x − M z‖² + ridge · tr((M − W) diag(Σ z zᵀ) (M − W)ᵀ)` over `M`, for every `W` at once.

    The approximation of rank `r` of `M` in the metric of `z`'s second moment is then the one whose outputs on `z` are
    closest to those of the dense layer on `x`: what is left over of `W x` does not depend on `z`. Where `z = x`, `M`
    is `W`. With a bias everything is taken from the means, which the bias makes up for.

    Args:
        sums: Of the layers' input. Large ones are overwritten.
        ridge: Relative to the diagonal of `Σ z zᵀ`, `> 0`: how strongly `M` keeps to `W` where samples say little.
        bias: Whether the layers have one.

    Raises:
        ShapeError, NonFiniteError, RangeError: bad inputs.
    """
    if not (math.isfinite(ridge) and ridge > 0):
        raise RangeError("ridge", ridge, "0 < ridge, relative to the diagonal")
    n = len(sums.gram)
    for name, tensor in (("gram", sums.gram), ("cross", sums.cross)):
        if tensor is not None and tuple(tensor.shape) != (n, n):
            raise ShapeError(name, tuple(tensor.shape), f"[{n}, {n}]")
        if tensor is not None:
            check_finite(name, tensor)
    count = double(sums.tokens).clamp(min=1)
    gram = double(sums.gram).div_(count)
    if sums.cross is None:
        return Compensation(gram)
    cross = double(sums.cross).div_(count)
    x, z = double(sums.x) / count, double(sums.z) / count
    if bias:
        cross.addr_(x, z, alpha=-1)
        gram.addr_(z, z, alpha=-1)
    # A direction that is always zero would be divided by; its column stays as it is.
    pull = torch.where(gram.diagonal() > 0, ridge * gram.diagonal(), 1.0)
    damped = gram.clone()
    damped.diagonal().add_(pull)
    # `M = W + W (X − Z) (Z + D)⁻¹`: exactly `W` where nothing has changed.
    change: Tensor = torch.linalg.solve(damped, cross.sub_(gram).mT).mT
    return Compensation(gram, change, *((x, z) if bias else (None, None)))
