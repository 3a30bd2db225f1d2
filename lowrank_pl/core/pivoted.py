"""A matrix of rank r as r of its rows and the others in terms of these. m: out_features, n: in_features, r: rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.core.factors import Factors
from lowrank_pl.core.precision import double

BOUND = 1.1
"""No entry of `others` is larger. On 12 weights of MiniLM, ranks 100 to 370, LU alone leaves entries of up to 4.1 and
relative errors in float32 of up to 1.2e-6; with this bound they are at most 7.6e-7, in two factors 3e-7."""


@dataclass(frozen=True)
class Pivoted:
    """`W = [P; K P]`, its rows in another order: `r (m + n − r)` numbers.

    Attributes:
        pivots: `P [r, n]`, rows of `W`.
        others: `K [m − r, r]`; `K P` are the other rows.
        order: `[m]`, int64: row `i` of `W` is row `order[i]` of `[P; K P]`.
    """

    pivots: Tensor
    others: Tensor
    order: Tensor

    def product(self) -> Tensor:
        """The dense matrix `[m, n]`."""
        return torch.cat([self.pivots, self.others @ self.pivots])[self.order]


def pivoted(factors: Factors, bound: float = BOUND, order: Tensor | None = None) -> Pivoted:
    """The same matrix by pivot rows that are as independent as they can be.

    With `Q [m, r]` any basis of the column space, `K = Q_others Q_pivots⁻¹` whatever the basis; an orthonormal one
    exists also where singular values are zero. LU with partial pivoting of `Q` chooses the rows to start from. Then, as
    long as an entry `K_ij` exceeds the bound, pivot `j` gives its place to row `i`: that multiplies the volume of
    `Q_pivots` by `|K_ij|`, so it ends. Without it entries can grow exponentially with the rank, and rounding with them.

    Args:
        factors: Of rank r, any floating dtype.
        bound: Of the entries of `K`, `> 1`.
        order: As in the result: takes these rows for pivots, whatever `K` becomes.

    Returns:
        In the dtype of the factors; computed in float64, exact but for rounding.

    References:
        Zhao, Zhang and Cannistraci, Pivoting factorization: a compact meta low-rank representation of sparsity for
        efficient inference in large language models, ICML 2025 (the form). Gu and Eisenstat, Efficient algorithms for
        computing a strong rank-revealing QR factorization, SIAM J. Sci. Comput. 17 (1996) (the exchanges; at exactly
        the rank of the matrix their criterion is the bound alone). The choice of rows is this project's.
    """
    left, sigma, right = (double(part) for part in (factors.left, factors.sigma, factors.right))
    basis = Factors.from_product(left * sigma, right)
    rank = basis.rank
    if order is None:
        rows, others = _sorted(*_bounded(*_start(basis.left), bound))
    else:
        rows = order.to(basis.left.device).argsort()
        others = torch.linalg.solve(basis.left[rows[:rank]], basis.left[rows[rank:]], left=False)
    pivots = (basis.left[rows[:rank]] * basis.sigma) @ basis.right
    like = factors.left
    return Pivoted(pivots.to(like), others.to(like), rows.argsort().to(like.device))


def _sorted(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Pivots and other rows in ascending order each: outputs are gathered from memory that is read in its order."""
    rank = others.shape[1]
    pivots, rest = rows[:rank].sort(), rows[rank:].sort()
    return torch.cat([pivots.values, rest.values]), others[rest.indices][:, pivots.indices]


def _start(q: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `Q [m, r]`, the pivots first, and `K`, by LU with partial pivoting."""
    m, rank = q.shape
    lu, swaps = torch.linalg.lu_factor(q)
    rows = list(range(m))
    for here, there in enumerate(swaps.tolist()):
        rows[here], rows[there - 1] = rows[there - 1], rows[here]
    # K = L₂ L₁⁻¹
    others = torch.linalg.solve_triangular(lu[:rank], lu[rank:], upper=False, left=False, unitriangular=True)
    return torch.tensor(rows, device=q.device), others


def _bounded(rows: Tensor, others: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Exchanges pivots until no entry of `K [m − r, r]` is larger than the bound."""
    rank = others.shape[1]
    while others.numel():
        largest = int(others.abs().argmax())
        i, j = divmod(largest, rank)
        pivot = float(others[i, j])
        if abs(pivot) <= bound:
            break
        # Row i = Σ_k K_ik p_k, solved for p_j and put in everywhere; the row that leaves is told by the new pivots.
        row, column = others[i] / pivot, others[:, j].clone()
        others -= torch.outer(column, row)
        others[:, j] = column / pivot
        others[i] = -row
        others[i, j] = 1 / pivot
        rows[[j, rank + i]] = rows[[rank + i, j]]
    return rows, others
