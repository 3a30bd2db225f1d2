"""The leading left singular vectors of a matrix. m: rows, n: columns, r: rank, k: min(m, n)."""

from __future__ import annotations

import torch
from torch import Tensor

TAIL = 1e-5
"""Least share of the largest squared singular value that the discarded ones must have for a Gram matrix to be used."""


def left_singular_vectors(matrix: Tensor, rank: int) -> Tensor:
    """An orthonormal basis `[m, r]` of the space of the largest singular values' left vectors.

    From the eigenvectors of the smaller Gram matrix, which cost a fraction of an SVD, wherever they are as good. A
    Gram matrix knows squares: what it says of `Σ_{k > r} σ_k²`, the squared error of the approximation, is off by
    about `2⁻⁵² σ₁²`. So it is used where that sum is at least `TAIL σ₁²`: the error of the approximation is then that
    of the SVD but for a relative 1e-10. Otherwise, that is for weights that a rank reproduces to about two digits or
    better, and at full rank, the SVD itself is taken.

    Args:
        matrix: `[m, n]`, float64, finite.
        rank: `1 … k`.

    Returns:
        The columns span the space; within it they are singular vectors only up to rounding.
    """
    m, n = matrix.shape
    if rank < min(m, n):
        largest = matrix.abs().max()
        # Squares of entries from 1e-154 down are zero, and infinite from 1e154 up.
        scaled = matrix / largest if largest > 0 else matrix
        squares, vectors = torch.linalg.eigh(scaled @ scaled.mT if m <= n else scaled.mT @ scaled)
        if bool(squares[:-rank].clamp(min=0).sum() >= TAIL * squares[-1]) and bool(squares[-1] > 0):
            leading = vectors[:, -rank:].flip(1)
            basis: Tensor = leading if m <= n else torch.linalg.qr(scaled @ leading).Q
            return basis
    u: Tensor = torch.linalg.svd(matrix, full_matrices=False)[0]
    return u[:, :rank]
