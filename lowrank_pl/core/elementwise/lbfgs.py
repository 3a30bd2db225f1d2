"""Limited-memory BFGS, preconditioned by the two-sided problem's curvature. W, F: [m, n]; A: [m, r]; B: [r, n]."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from lowrank_pl.core.elementwise.line import Pair, best_step, quartic
from lowrank_pl.core.elementwise.problem import WeightedProblem
from lowrank_pl.core.elementwise.solver import ElementwiseSolver, Iterate

_FLOOR = 1e-3
_RIDGE = 1e-6


class PreconditionedLBFGS(ElementwiseSolver):
    """Quasi-Newton over both factors, starting from the curvature of the nearest problem with a closed form.

    Where `F` were exactly `a bᵀ`, the Hessian blocks of `A` and `B` would be `a_i · B diag(b) Bᵀ` and
    `b_j · Aᵀ diag(a) A`: two `[r, r]` Cholesky factors that serve all rows and columns. They precondition, limited
    memory learns the rest, and the step length is exact because the objective along a line is a quartic. A step costs
    five products of `2 m n r` operations, and the objective never goes up.

    Args:
        max_steps: Steps at most.
        tolerance: Stop when a step improves the objective by less than this share.
        memory: Pairs of steps and gradient changes that are kept, `>= 1`.
    """

    def __init__(self, max_steps: int = 60, tolerance: float = 2e-4, memory: int = 8) -> None:
        super().__init__(max_steps, tolerance, patience=2)
        self.memory = memory

    def iterate(self, problem: WeightedProblem, a: Tensor, b: Tensor) -> Iterator[Iterate]:
        """One quasi-Newton step per step; ends when no direction descends."""
        precondition = _Preconditioner(problem, a, b)
        pairs: deque[tuple[Pair, Pair, float]] = deque(maxlen=self.memory)
        residual = problem.residual(a, b)
        gradient = problem.gradients(a, b, residual)
        while True:
            direction = _direction(gradient, pairs, precondition)
            coefficients, p, q = quartic(problem, residual, (a, b), direction)
            t = best_step(coefficients)
            if t == 0.0 and not pairs:
                return
            if t == 0.0:
                pairs.clear()  # a memory of another region: start again from the preconditioner alone
                continue
            step = (t * direction[0], t * direction[1])
            a, b = a + step[0], b + step[1]
            residual = residual.add(p, alpha=t).add_(q, alpha=t * t)
            before, gradient = gradient, problem.gradients(a, b, residual)
            change = (gradient[0] - before[0], gradient[1] - before[1])
            curvature = _dot(step, change)
            if curvature > 0:
                pairs.append((step, change, curvature))
            yield a, b, problem.loss_of(residual)


class _Preconditioner:
    """The inverse Hessian blocks of the two-sided problem."""

    def __init__(self, problem: WeightedProblem, a: Tensor, b: Tensor) -> None:
        # F has mean 1, so its row and column means multiply to the nearest a bᵀ; the floor keeps unimportant rows
        # from taking unbounded steps.
        self._rows = problem.importance.mean(1) + _FLOOR
        self._columns = problem.importance.mean(0) + _FLOOR
        self._factor_a = _cholesky((b * self._columns) @ b.mT)
        self._factor_b = _cholesky((a.mT * self._rows) @ a)
        self._scale = problem.total / 2

    def __call__(self, gradient: Pair) -> Pair:
        for_a = torch.cholesky_solve((gradient[0] / self._rows[:, None]).mT, self._factor_a).mT
        for_b = torch.cholesky_solve(gradient[1] / self._columns[None, :], self._factor_b)
        return self._scale * for_a, self._scale * for_b


def _cholesky(gram: Tensor) -> Tensor:
    """Cholesky factor of a positive semi-definite matrix, with as much ridge as it needs."""
    mean = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    ridge = _RIDGE
    while True:
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * mean * identity)
        if int(failed) == 0:
            return factor
        ridge *= 10


def _direction(gradient: Pair, pairs: deque[tuple[Pair, Pair, float]], precondition: _Preconditioner) -> Pair:
    """The two-loop recursion of Nocedal and Wright, Numerical Optimization, algorithm 7.4."""
    q = gradient
    weights = []
    for step, change, curvature in reversed(pairs):
        weight = _dot(step, q) / curvature
        weights.append(weight)
        q = _axpy(-weight, change, q)
    found = precondition(q)
    if pairs:
        _, change, curvature = pairs[-1]
        scale = curvature / _dot(change, precondition(change))
        found = (scale * found[0], scale * found[1])
    for (step, change, curvature), weight in zip(pairs, reversed(weights), strict=True):
        found = _axpy(weight - _dot(change, found) / curvature, step, found)
    return -found[0], -found[1]


def _dot(x: Pair, y: Pair) -> float:
    return sum(float((u * v).sum(dtype=torch.float64)) for u, v in zip(x, y, strict=True))


def _axpy(scale: float, x: Pair, y: Pair) -> Pair:
    return torch.add(y[0], x[0], alpha=scale), torch.add(y[1], x[1], alpha=scale)
