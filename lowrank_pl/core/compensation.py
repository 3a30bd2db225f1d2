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
        apart: `Σ ‖x − z‖²`, a scalar; not looked at without `cross`.
    """

    gram: Tensor
    cross: Tensor | None
    x: Tensor
    z: Tensor
    tokens: Tensor
    apart: Tensor


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


def compensation(sums: PairedSums, ridge: float | None, bias: bool) -> Compensation:
    """Minimises `Σ ‖W x − M z‖² + ridge · tr((M − W) diag(Σ z zᵀ) (M − W)ᵀ)` over `M`, for every `W` at once.

    The approximation of rank `r` of `M` in the metric of `z`'s second moment is then the one whose outputs on `z` are
    closest to those of the dense layer on `x`: what is left over of `W x` does not depend on `z`. Where `z = x`, `M`
    is `W`. With a bias everything is taken from the means, which the bias makes up for.

    `M = W + W B` with `B` the regression of `x − z` on `z`. Its `n²` numbers follow from `t` tokens; few tokens would
    give a `B` that does harm to others. By default the ridge is the one for which generalised cross-validation expects
    the least `‖x − z − B z‖²` on other tokens, and where none is expected to do better than `B = 0`, that is taken.

    Args:
        sums: Of the layers' input. Large ones are overwritten.
        ridge: Relative to the diagonal of `Σ z zᵀ`, `> 0`: how strongly `M` keeps to `W`; `None`: by cross-validation.
        bias: Whether the layers have one.

    Raises:
        ShapeError, NonFiniteError, RangeError: bad inputs.

    References:
        Golub, Heath and Wahba, Generalized cross-validation as a method for choosing a good ridge parameter,
        Technometrics 21, 1979. That it is applied to layers behind factorised ones is this project's.
    """
    if ridge is not None and not (math.isfinite(ridge) and ridge > 0):
        raise RangeError("ridge", ridge, "0 < ridge, relative to the diagonal, or null")
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
    x, z, apart = double(sums.x) / count, double(sums.z) / count, double(sums.apart) / count
    if bias:
        cross.addr_(x, z, alpha=-1)
        gram.addr_(z, z, alpha=-1)
        gram.diagonal().clamp_(min=0)  # of an input that never varies rounding is left, of either sign
        apart = apart - (x - z).square().sum()
    change = _regression(gram, cross.sub_(gram), ridge, float(apart), float(count))
    return Compensation(gram, change, *((x, z) if bias else (None, None)))


_RIDGES = tuple(10.0 ** (exponent / 2) for exponent in range(-6, 7))
"""Those that are tried, relative to the diagonal."""


def _regression(gram: Tensor, difference: Tensor, ridge: float | None, apart: float, tokens: float) -> Tensor | None:
    """`B = K (Z + ridge · diag Z)⁻¹` with `Z` the moment of `z` and `K` that of `x − z` and `z`; `None` for zero.

    Args:
        gram: `Z`, `[n, n]`.
        difference: `K`, `[n, n]`.
        ridge: `None` to choose one.
        apart: Mean of `‖x − z‖²`.
        tokens: `t`.
    """
    # A direction that is always zero would be divided by; its column stays zero.
    scale = torch.where(gram.diagonal() > 0, gram.diagonal(), 1.0).rsqrt()
    if ridge is not None:
        scaled = scale[:, None] * gram * scale
        scaled.diagonal().add_(ridge)
        found: Tensor = torch.linalg.solve(scaled, (difference * scale).mT).mT
        return found.mul_(scale)
    values, vectors = torch.linalg.eigh(scale[:, None] * gram * scale)
    values = values.clamp(min=0)
    turned = (difference * scale) @ vectors
    energies = turned.square().sum(0)
    least, best = apart, None
    for tried in _RIDGES:
        weights = 1 / (values + tried)
        left = apart - float((energies * (2 * weights - values * weights.square())).sum())
        free = 1 - float((values * weights).sum()) / tokens
        if free > 0 and left / free**2 < least:
            least, best = left / free**2, tried
    if best is None:
        return None
    chosen: Tensor = (turned / (values + best)) @ vectors.mT
    return chosen.mul_(scale)
