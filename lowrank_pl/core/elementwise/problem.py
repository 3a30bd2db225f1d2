"""The objective and its derivatives. W, F: [m, n]; A: [m, r]; B: [r, n]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.core.checks import check_importance, check_weight
from lowrank_pl.core.precision import double


def shrink_importance(importance: Tensor, shrinkage: float) -> Tensor:
    """`(1 − s) F + s a bᵀ / ΣF`, with `a` and `b` the sums of `F [m, n]` along its rows and columns.

    The second term is the rank-one matrix with the same sums: what FWSVD with both sides weighs by. At `s = 1` the
    element-wise problem is that one.
    """
    if shrinkage == 0:
        return importance
    full = double(importance)
    total = full.sum()
    if total == 0:
        return importance
    rank_one = torch.outer(full.sum(1), full.sum(0) / total)
    return torch.lerp(full, rank_one, shrinkage).to(importance.dtype).to(importance.device)


@dataclass(frozen=True)
class WeightedProblem:
    """`min Σ_ij F_ij (W_ij − (A B)_ij)² / Σ_ij F_ij W_ij²` over all `A B` of a rank.

    The division makes losses comparable between layers: 0 is perfect, 1 is what a zero matrix scores.

    Attributes:
        weight: `W [m, n]`, float32 or float64.
        importance: `F [m, n] >= 0`, scaled to mean 1.
        total: `Σ F W²`.
    """

    weight: Tensor
    importance: Tensor
    total: float

    @classmethod
    def of(cls, weight: Tensor, importance: Tensor) -> WeightedProblem:
        """Checks and scales the inputs; all-zero importance counts as all equal.

        Half precisions are computed in float32.

        Raises:
            ShapeError, NonFiniteError, ImportanceError: bad inputs.
        """
        check_weight(weight)
        check_importance("importance", importance, tuple(weight.shape))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        # A float64 mean, and the division before the cast: a Fisher information of 1e-30 is normal.
        scaled = importance.double()
        mean = scaled.mean()
        scaled = scaled / mean if mean > 0 else torch.ones_like(scaled)
        w = weight.detach().to(dtype)
        total = float((scaled * w.double().square()).sum())
        return cls(w, scaled.to(dtype), total if total > 0 else 1.0)

    def residual(self, a: Tensor, b: Tensor) -> Tensor:
        """`A B − W`, `[m, n]`."""
        return torch.addmm(self.weight, a, b, beta=-1)

    def loss_of(self, residual: Tensor) -> float:
        """The objective at a residual."""
        return dot(self.importance * residual, residual) / self.total

    def loss(self, a: Tensor, b: Tensor) -> float:
        """The objective."""
        return self.loss_of(self.residual(a, b))

    def gradients(self, a: Tensor, b: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """`∂/∂A [m, r]` and `∂/∂B [r, n]` of the objective at a residual of `A`, `B`."""
        return self.loss_and_gradients(a, b, residual)[1]

    def loss_and_gradients(self, a: Tensor, b: Tensor, residual: Tensor) -> tuple[float, tuple[Tensor, Tensor]]:
        """The objective and its gradients, sharing what they have in common."""
        weighted = self.importance * residual
        loss = dot(weighted, residual) / self.total
        weighted.mul_(2 / self.total)
        return loss, (weighted @ b.mT, a.mT @ weighted)


def dot(x: Tensor, y: Tensor) -> float:
    """`Σ x y` of matrices: within rows in their dtype, over rows in float64."""
    return float(torch.linalg.vecdot(x, y).sum(dtype=torch.float64))
