"""Checks that every factorisation makes before it starts. m: out_features, n: in_features."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.numerics import ImportanceError, NonFiniteError, ShapeError


def check_weight(weight: Tensor, rank: int | None = None) -> LinearShape:
    """Returns the shape of a finite, two-dimensional weight, or raises.

    Raises:
        ShapeError: `weight` is not a matrix.
        NonFiniteError: it contains NaN or Inf.
        RankError: `rank` is outside `1 … min(m, n)`.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ShapeError("weight", tuple(weight.shape), "[out, in] with both above 0")
    shape = LinearShape(*weight.shape)
    if rank is not None:
        shape.check_rank(rank)
    check_finite("weight", weight)
    return shape


def check_finite(what: str, tensor: Tensor, layer: str | None = None) -> None:
    """Raises `NonFiniteError` if the tensor contains NaN or Inf; one without values (on `meta`) contains none."""
    if tensor.is_meta:
        return
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        raise NonFiniteError(what, int((~finite).sum()), layer)


def check_importance(what: str, importance: Tensor, shape: tuple[int, ...]) -> None:
    """Raises unless the importance has the shape given and is finite and nowhere negative."""
    if tuple(importance.shape) != shape:
        raise ShapeError(what, tuple(importance.shape), str(list(shape)))
    check_finite(what, importance)
    if bool((importance < 0).any()):
        position = tuple(int(i) for i in torch.nonzero(importance < 0)[0])
        raise ImportanceError(what, float(importance[position]), position)
