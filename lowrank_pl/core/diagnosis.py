"""What an importance looks like, and what each method would make of it. W, F: [m, n]; r: rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.core.axis_weighted import axis_weighted_svd
from lowrank_pl.core.checks import check_importance, check_weight
from lowrank_pl.core.elementwise import ElementwiseSolver, PreconditionedLBFGS, WeightedProblem
from lowrank_pl.core.factors import Factors
from lowrank_pl.core.precision import beside_float64
from lowrank_pl.core.svd import truncated_svd

SVD, INPUT, OUTPUT, BOTH, ELEMENTWISE = "SVD", "FWSVD input", "FWSVD output", "FWSVD both", "TFWSVD"


@dataclass(frozen=True)
class Diagnosis:
    """Indicators of one matrix and its importance.

    Attributes:
        variance: `φ = Var_ij(F_ij)`.
        relative_variance: `φ / mean(F)²`, free of scale.
        within_input: `mean_j Var_i(F_ij) / mean(F)²`: the part that one weight per input cannot see.
        rank_one_residual: `‖F − a bᵀ / ΣF‖_F / ‖F‖_F` with `a`, `b` the sums of `F` along both axes: the part that
            two-sided weights cannot see; 0 for an importance of rank one.
        objective: Per method, `Σ F (W − Ŵ)² / Σ F W²` at the rank.
        expected_rise: Per method, `½ Σ F (W − Ŵ)²`: the rise of the loss to second order, were the Fisher
            information the Hessian.
        recommendation: The simplest method whose objective is within `margin` of the best one's.
    """

    variance: float
    relative_variance: float
    within_input: float
    rank_one_residual: float
    objective: dict[str, float]
    expected_rise: dict[str, float]
    recommendation: str

    @property
    def gain(self) -> float:
        """Share of plain SVD's objective that the recommended method saves."""
        plain = self.objective[SVD]
        return 1 - self.objective[self.recommendation] / plain if plain > 0 else 0.0


def diagnose(
    weight: Tensor, importance: Tensor, rank: int, solver: ElementwiseSolver | None = None, margin: float = 0.1
) -> Diagnosis:
    """Computes the indicators and tries every method on one matrix.

    Args:
        weight: `W [m, n]`, finite.
        importance: `F [m, n] >= 0`, finite, in its own scale.
        rank: `1 … min(m, n)`.
        solver: For the element-wise method; `PreconditionedLBFGS()` by default.
        margin: How much worse than the best a simpler method may be to be recommended, as a share.

    Raises:
        ShapeError, NonFiniteError, RankError, ImportanceError: bad inputs.

    References:
        Hua et al., Numerical optimizations for weighted low-rank estimation on language models, EMNLP 2022 (`φ`, which
        they call the variance of the Fisher information); the other indicators are this project's.
    """
    check_weight(weight, rank)
    check_importance("importance", importance, tuple(weight.shape))
    weight, importance = beside_float64(weight), beside_float64(importance)
    f = importance.double()
    mean, total = float(f.mean()), f.sum()
    square = mean * mean if mean > 0 else 1.0
    rank_one = torch.outer(f.sum(1), f.sum(0) / total) if total > 0 else f
    norm = torch.linalg.norm(f)
    variance = float(f.var(correction=0))
    objective = _objectives(weight, importance, rank, solver)
    scale = float((f * weight.double().square()).sum()) / 2
    best = min(objective.values())
    return Diagnosis(
        variance,
        variance / square,
        float(f.var(0, correction=0).mean()) / square,
        float(torch.linalg.norm(f - rank_one) / norm) if norm > 0 else 0.0,
        objective,
        {method: scale * value for method, value in objective.items()},
        next(method for method, value in objective.items() if value <= best * (1 + margin)),
    )


def _objectives(weight: Tensor, importance: Tensor, rank: int, solver: ElementwiseSolver | None) -> dict[str, float]:
    """From the simplest method to the most general one."""
    problem = WeightedProblem.of(weight, importance)
    inputs, outputs = importance.double().sum(0), importance.double().sum(1)
    closed: dict[str, Factors] = {
        SVD: truncated_svd(problem.weight, rank),
        INPUT: axis_weighted_svd(problem.weight, rank, inputs),
        OUTPUT: axis_weighted_svd(problem.weight, rank, None, outputs),
        BOTH: axis_weighted_svd(problem.weight, rank, inputs, outputs),
    }
    found = {method: problem.loss(*factors.balanced()) for method, factors in closed.items()}
    start = closed[min(found, key=lambda method: found[method])]
    found[ELEMENTWISE] = (solver or PreconditionedLBFGS()).solve(problem.weight, importance, start).loss
    return found
