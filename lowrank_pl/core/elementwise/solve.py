"""The one call: from a weight and its importance to factors. W, F: [m, n]; r: rank."""

from __future__ import annotations

from torch import Tensor

from lowrank_pl.core.axis_weighted import axis_weighted_svd
from lowrank_pl.core.checks import check_importance, check_weight
from lowrank_pl.core.elementwise.lbfgs import PreconditionedLBFGS
from lowrank_pl.core.elementwise.problem import WeightedProblem
from lowrank_pl.core.elementwise.solver import ElementwiseSolver, SolveResult
from lowrank_pl.core.factors import Factors
from lowrank_pl.core.precision import beside_float64


def weighted_low_rank(
    weight: Tensor, importance: Tensor, rank: int, solver: ElementwiseSolver | None = None
) -> SolveResult:
    """Minimises `Σ_ij F_ij (W_ij − (A B)_ij)²` over all `A B` of a rank.

    Starts from the best of the three closed forms (weighted by input, by output, by both), so that the result is
    never worse than FWSVD; `solver` improves on it.

    Args:
        weight: `W [m, n]`, finite, any floating dtype.
        importance: `F [m, n] >= 0`, finite, any scale; all-zero counts as all equal.
        rank: `1 … min(m, n)`.
        solver: `PreconditionedLBFGS()` by default.

    Returns:
        Factors in the weight's dtype, the curve of losses, and why the solver stopped.

    Raises:
        ShapeError, NonFiniteError, RankError, ImportanceError: bad inputs.

    References:
        Hua et al., Numerical optimizations for weighted low-rank estimation on language models, EMNLP 2022 (the
        objective). Srebro and Jaakkola, Weighted low-rank approximations, ICML 2003.
    """
    check_weight(weight, rank)
    check_importance("importance", importance, tuple(weight.shape))
    start = best_closed_form(weight, importance, rank)
    return (solver or PreconditionedLBFGS()).solve(weight, importance, start)


def best_closed_form(weight: Tensor, importance: Tensor, rank: int) -> Factors:
    """The closed form with the lowest objective: importance summed over outputs, over inputs, or both.

    Args:
        weight: `[m, n]`.
        importance: `[m, n] >= 0`.
        rank: `1 … min(m, n)`.
    """
    weight, importance = beside_float64(weight), beside_float64(importance)
    problem = WeightedProblem.of(weight, importance)
    inputs, outputs = importance.double().sum(0), importance.double().sum(1)
    candidates = [
        axis_weighted_svd(problem.weight, rank, inputs, outputs),
        axis_weighted_svd(problem.weight, rank, inputs),
        axis_weighted_svd(problem.weight, rank, None, outputs),
    ]
    return min(candidates, key=lambda factors: problem.loss(*factors.balanced()))
