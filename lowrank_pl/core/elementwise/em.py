"""Expectation maximisation. W, F: [m, n]; A: [m, r]; B: [r, n]."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lowrank_pl.core.elementwise.problem import WeightedProblem
from lowrank_pl.core.elementwise.solver import ElementwiseSolver, Iterate
from lowrank_pl.core.svd import truncated_svd


class EM(ElementwiseSolver):
    """`X ← SVD_r(P ∘ W + (1 − P) ∘ X)` with `P = F / max F`; the objective never goes up.

    An entry of importance `P` counts as seen with that probability, and as filled in by the model otherwise. Simple,
    and slow where a few entries dominate: most `P` are then near zero, and so is every step.

    Args:
        max_steps: Steps at most, one SVD each.
        tolerance: Stop when a step improves the objective by less than this share.

    References:
        Srebro and Jaakkola, Weighted low-rank approximations, ICML 2003, section 3.
    """

    def __init__(self, max_steps: int = 50, tolerance: float = 1e-6) -> None:
        super().__init__(max_steps, tolerance)

    def iterate(self, problem: WeightedProblem, a: Tensor, b: Tensor) -> Iterator[Iterate]:
        """One SVD per step."""
        p = problem.importance / problem.importance.max()
        x = a @ b
        while True:
            a, b = truncated_svd(x + p * (problem.weight - x), a.shape[1]).balanced()
            x = a @ b
            yield a, b, problem.loss_of(x - problem.weight)
