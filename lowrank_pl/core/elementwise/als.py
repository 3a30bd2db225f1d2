"""Alternating weighted least squares. W, F: [m, n]; A: [m, r]; B: [r, n]."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowrank_pl.core.elementwise.problem import WeightedProblem
from lowrank_pl.core.elementwise.solver import ElementwiseSolver, Iterate

CHUNK_BYTES = 128 * 2**20
"""Upper bound of each of the two batched temporaries."""

_RIDGE = 1e-10


class ALS(ElementwiseSolver):
    """Solves for all rows of `A`, then for all columns of `B`, exactly; the objective never goes up.

    Each row is a weighted least-squares problem with an `[r, r]` normal matrix, `Σ_j F_ij B_j B_jᵀ`; they are
    formed and factorised (Cholesky, float64) in batches. A sweep costs `2 m n r²` multiplications, `r / 3` times a
    gradient step, and is worth it near the optimum.

    Args:
        max_steps: Sweeps at most.
        tolerance: Stop when a sweep improves the objective by less than this share.
    """

    def __init__(self, max_steps: int = 20, tolerance: float = 1e-4) -> None:
        super().__init__(max_steps, tolerance)

    def iterate(self, problem: WeightedProblem, a: Tensor, b: Tensor) -> Iterator[Iterate]:
        """One sweep per step."""
        w, f = problem.weight, problem.importance
        w_t, f_t = w.mT.contiguous(), f.mT.contiguous()
        while True:
            a = _rows(w, f, b, a)
            b = _rows(w_t, f_t, a.mT.contiguous(), b.mT).mT.contiguous()
            yield a, b, problem.loss(a, b)


def _rows(w: Tensor, f: Tensor, b: Tensor, present: Tensor) -> Tensor:
    """The rows `a_i = argmin Σ_j F_ij (W_ij − a_i B_j)²`, as a correction of the present ones.

    Solving for the correction keeps a row whose weights are all zero where it is, and rounding relative to the
    correction instead of to the row.
    """
    rank, n = b.shape
    step = max(1, CHUNK_BYTES // (8 * max(rank * rank, rank * n)))
    basis = b.double()
    identity = torch.eye(rank, dtype=torch.float64, device=b.device)
    found = present.clone()
    for begin in range(0, len(w), step):
        rows = slice(begin, begin + step)
        weights = f[rows].double()
        residual = w[rows].double() - found[rows].double() @ basis
        normal = (basis[None] * weights[:, None, :]) @ basis.mT
        scale = normal.diagonal(dim1=1, dim2=2).mean(1)
        ridge = torch.where(scale > 0, _RIDGE * scale, 1.0)
        factor, failed = torch.linalg.cholesky_ex(normal + ridge[:, None, None] * identity)
        right = ((weights * residual) @ basis.mT)[..., None]
        correction = torch.cholesky_solve(right, factor)[..., 0]
        # A numerically singular row keeps what it has; the ridge makes it rare.
        usable = (failed == 0) & torch.isfinite(correction).all(1)
        found[rows] += torch.where(usable[:, None], correction, 0.0).to(found.dtype)
    return found
