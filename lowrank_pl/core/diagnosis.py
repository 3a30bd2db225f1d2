"""What an importance looks like, and what each method would make of it. W, F: [m, n]; r: rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowrank_pl.core.axis_weighted import axis_weighted_svd
from lowrank_pl.core.checks import check_importance, check_weight
from lowrank_pl.core.elementwise import ElementwiseSolver, PreconditionedLBFGS, WeightedProblem
from lowrank_pl.core.factors import Factors
from lowrank_pl.core.kronecker import KroneckerGroups
from lowrank_pl.core.precision import beside_float64
from lowrank_pl.core.svd import truncated_svd

SVD, INPUT, OUTPUT, BOTH, ELEMENTWISE = "SVD", "FWSVD input", "FWSVD output", "FWSVD both", "TFWSVD"
KRONECKER = "KroneckerSVD"
_MARGIN = 0.1


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
            information the Hessian, and nothing but its diagonal.
        recommendation: The simplest method that is within `margin` of the best by `compared`.
        energy_lost: Share of its energy in the Kronecker metric that the layer loses at the rank; `None` without one.
        full_rise: Per method, `½ mean_d ⟨∂L_d/∂W, W − Ŵ⟩²`: `expected_rise` with the layer's whole Fisher information
            instead of its diagonal. Empty if it was not measured.
    """

    variance: float
    relative_variance: float
    within_input: float
    rank_one_residual: float
    objective: dict[str, float]
    expected_rise: dict[str, float]
    recommendation: str
    energy_lost: float | None = None
    full_rise: dict[str, float] = field(default_factory=dict)

    @property
    def compared(self) -> dict[str, float]:
        """By what methods are compared: `full_rise` where it was measured, else `objective`."""
        return self.full_rise or self.objective

    @property
    def gain(self) -> float:
        """Share of plain SVD's damage that the recommended method saves."""
        plain = self.compared[SVD]
        return 1 - self.compared[self.recommendation] / plain if plain > 0 else 0.0

    def judged(self, full_rise: Mapping[str, float], margin: float = _MARGIN) -> Diagnosis:
        """The same with a recommendation by what was measured of each method."""
        return replace(self, full_rise=dict(full_rise), recommendation=_simplest(full_rise, margin))


def diagnose(
    weight: Tensor,
    importance: Tensor,
    rank: int,
    solver: ElementwiseSolver | None = None,
    margin: float = _MARGIN,
    groups: KroneckerGroups | None = None,
) -> Diagnosis:
    """Computes the indicators and tries every method on one matrix; see `compare_methods`."""
    return compare_methods(weight, importance, rank, solver, margin, groups)[0]


def compare_methods(
    weight: Tensor,
    importance: Tensor,
    rank: int,
    solver: ElementwiseSolver | None = None,
    margin: float = _MARGIN,
    groups: KroneckerGroups | None = None,
) -> tuple[Diagnosis, dict[str, Factors]]:
    """Computes the indicators, tries every method on one matrix and hands out what they gave.

    Args:
        weight: `W [m, n]`, finite.
        importance: `F [m, n] >= 0`, finite, in its own scale.
        rank: `1 … min(m, n)`.
        solver: For the element-wise method; `PreconditionedLBFGS()` by default.
        margin: How much worse than the best a simpler method may be to be recommended, as a share.
        groups: The weight in a Kronecker metric, where that method is to be tried too.

    Returns:
        The diagnosis, and factors of the rank by method, float32 or float64.

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
    factors = _factors(weight, importance, rank, solver, groups)
    problem = WeightedProblem.of(weight, importance)
    objective = {method: problem.loss(*found.balanced()) for method, found in factors.items()}
    scale = float((f * weight.double().square()).sum()) / 2
    diagnosis = Diagnosis(
        variance,
        variance / square,
        float(f.var(0, correction=0).mean()) / square,
        float(torch.linalg.norm(f - rank_one) / norm) if norm > 0 else 0.0,
        objective,
        {method: scale * value for method, value in objective.items()},
        _simplest(objective, margin),
        None if groups is None else groups.relative_error(rank) ** 2,
    )
    return diagnosis, factors


def _simplest(found: Mapping[str, float], margin: float) -> str:
    """The first of methods, in the order from simple to general, that is within a margin of the best."""
    best = min(found.values())
    return next(method for method, value in found.items() if value <= best * (1 + margin))


def _factors(
    weight: Tensor, importance: Tensor, rank: int, solver: ElementwiseSolver | None, groups: KroneckerGroups | None
) -> dict[str, Factors]:
    """From the simplest method to the most general one."""
    problem = WeightedProblem.of(weight, importance)
    inputs, outputs = importance.double().sum(0), importance.double().sum(1)
    found: dict[str, Factors] = {
        SVD: truncated_svd(problem.weight, rank),
        INPUT: axis_weighted_svd(problem.weight, rank, inputs),
        OUTPUT: axis_weighted_svd(problem.weight, rank, None, outputs),
        BOTH: axis_weighted_svd(problem.weight, rank, inputs, outputs),
    }
    losses = {method: problem.loss(*factors.balanced()) for method, factors in found.items()}
    start = found[min(losses, key=lambda method: losses[method])]
    if groups is not None:
        found[KRONECKER] = groups.factors(rank).like(problem.weight)
    found[ELEMENTWISE] = (solver or PreconditionedLBFGS()).solve(problem.weight, importance, start).factors
    return found
