"""What every solver is: an iteration with one way of stopping, keeping the best and telling why."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_pl.core.elementwise.problem import WeightedProblem
from lowrank_pl.core.factors import Factors
from lowrank_pl.core.precision import beside_float64
from lowrank_pl.errors.numerics import RangeError, ShapeError

DIVERGED = "diverged"


@dataclass(frozen=True)
class SolveResult:
    """What a solver found.

    Attributes:
        factors: The best iterate, in singular form and the weight's dtype; never worse than the start.
        losses: The objective (share of `Σ F W²`) at the start and after every step.
        converged: Whether the steps became small, as opposed to running out or diverging.
        reason: Why it stopped, in words.
    """

    factors: Factors
    losses: tuple[float, ...]
    converged: bool
    reason: str

    @property
    def loss(self) -> float:
        """The objective at `factors`, up to rounding."""
        return min(self.losses)


Iterate = tuple[Tensor, Tensor, float]


class ElementwiseSolver(ABC):
    """Improves factors of a weight under an element-wise importance.

    Args:
        max_steps: Steps at most, `>= 1`.
        tolerance: Stop when a step improves the objective by less than this share of its value; 0 never does.
        patience: So many such steps in a row, for methods whose progress is uneven.
    """

    def __init__(self, max_steps: int, tolerance: float, patience: int = 1) -> None:
        if max_steps < 1:
            raise RangeError("max_steps", max_steps, "a whole number from 1")
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise RangeError("tolerance", tolerance, "0 <= tolerance, a share of the objective")
        self.max_steps = max_steps
        self.tolerance = tolerance
        self.patience = patience

    @abstractmethod
    def iterate(self, problem: WeightedProblem, a: Tensor, b: Tensor) -> Iterator[Iterate]:
        """Yields `A`, `B` and the objective after each step, without end or until no step is possible."""

    def solve(self, weight: Tensor, importance: Tensor, start: Factors) -> SolveResult:
        """Runs the iteration from a start.

        Args:
            weight: `W [m, n]`, finite.
            importance: `F [m, n] >= 0`, finite, any scale.
            start: Factors of the rank that is wanted.

        Returns:
            The best iterate and the curve of losses. A solver that diverges is stopped with a warning.

        Raises:
            ShapeError, NonFiniteError, ImportanceError: bad inputs.
        """
        shape = (start.left.shape[0], start.right.shape[1])
        if shape != tuple(weight.shape):
            raise ShapeError("the start's product", shape, f"that of the weight, {list(weight.shape)}")
        device = weight.device
        problem = WeightedProblem.of(beside_float64(weight), beside_float64(importance))
        with torch.no_grad():
            start = start.to(start.left.dtype, problem.weight.device)
            result = self._solve(problem, start, weight.dtype)
        return replace(result, factors=result.factors.to(weight.dtype, device))

    def _solve(self, problem: WeightedProblem, start: Factors, dtype: torch.dtype) -> SolveResult:
        a, b = (factor.to(problem.weight.dtype) for factor in start.balanced())
        losses = [problem.loss(a, b)]
        best, found = losses[0], start
        improved: tuple[Tensor, Tensor] | None = None
        small = 0
        reason, converged = f"max_steps={self.max_steps} reached", False
        floor = (32 * torch.finfo(problem.weight.dtype).eps) ** 2  # what rounding leaves of a perfect fit
        if best <= floor:
            return SolveResult(start.to(dtype), tuple(losses), True, "the start is exact")
        for step, (a_k, b_k, loss) in enumerate(self.iterate(problem, a, b), start=1):
            losses.append(loss)
            if not math.isfinite(loss) or loss > 1e3 * max(losses[0], floor):
                reason = f"{DIVERGED} at step {step}"
                warnings.warn(f"{type(self).__name__} {reason}; keeping the best of its iterates", stacklevel=3)
                losses[-1] = math.inf if not math.isfinite(loss) else loss
                break
            gain = best - loss
            if loss < best:
                best, improved = loss, (a_k.clone(), b_k.clone())
            small = small + 1 if gain <= self.tolerance * best else 0
            if best <= floor or (self.tolerance > 0 and small >= self.patience):
                reason, converged = f"converged to tolerance {self.tolerance:g}", True
                break
            if step == self.max_steps:
                break
        else:
            reason, converged = "no further step possible", True
        if improved is not None:
            found = Factors.from_product(*(factor.double() for factor in improved))
        return SolveResult(found.to(dtype), tuple(losses), converged, reason)
