"""Limited-memory BFGS, preconditioned by the two-sided problem's curvature. W, F: [m, n]; A: [m, r]; B: [r, n]."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.core.elementwise.line import Pair, best_step, quartic
from lowrank_pl.core.elementwise.problem import WeightedProblem
from lowrank_pl.core.elementwise.solver import ElementwiseSolver, Iterate

_FLOOR = 1e-3
_RIDGE = 1e-6
_SUFFICIENT = 1e-2
"""Share of the descent that the slope promises which makes a full step good enough."""


class PreconditionedLBFGS(ElementwiseSolver):
    """Quasi-Newton over both factors, starting from the curvature of the nearest problem with a closed form.

    Where `F` were exactly `a bᵀ`, the Hessian blocks of `A` and `B` would be `a_i · B diag(b) Bᵀ` and
    `b_j · Aᵀ diag(a) A`: two `[r, r]` inverses that serve all rows and columns. They precondition, limited memory
    learns the rest. A full step costs three products of `2 m n r` operations, as one of gradient descent; where it
    does not descend enough, the objective along the line is a quartic whose minimum is exact, for two products more.
    The objective never goes up.

    Args:
        max_steps: Steps at most.
        tolerance: Stop when a step improves the objective by less than this share, twice in a row.
        memory: Pairs of steps and gradient changes that are kept, `>= 1`.

    References:
        Nocedal and Wright, Numerical Optimization, 2006, algorithm 7.4 (the two-loop recursion).
    """

    def __init__(self, max_steps: int = 60, tolerance: float = 2e-4, memory: int = 5) -> None:
        super().__init__(max_steps, tolerance, patience=2)
        self.memory = memory

    def iterate(self, problem: WeightedProblem, a: Tensor, b: Tensor) -> Iterator[Iterate]:
        """One quasi-Newton step per step; ends when no direction descends."""
        precondition = _Preconditioner(problem, a, b)
        pairs: deque[_Memory] = deque(maxlen=self.memory)
        place = _Place.at(problem, a, b)
        smoothed = precondition(place.gradient)
        while True:
            direction = _direction(place.gradient, smoothed, pairs)
            found = _move(problem, place, direction, try_whole=bool(pairs))
            if found is None and not pairs:
                return
            if found is None:
                pairs.clear()  # a memory of another region: start again from the preconditioner alone
                continue
            step, change = found.point - place.point, found.gradient - place.gradient
            before, smoothed = smoothed, precondition(found.gradient)
            curvature = float(torch.dot(step, change))
            if curvature > 0:
                pairs.append(_Memory(step, change, smoothed - before, curvature))
            place = found
            yield *place.factors, place.loss


@dataclass(frozen=True)
class _Place:
    """A point `(A, B)`, flat, with everything that is known there."""

    point: Tensor
    residual: Tensor
    loss: float
    gradient: Tensor
    rank: int

    @classmethod
    def at(cls, problem: WeightedProblem, a: Tensor, b: Tensor, residual: Tensor | None = None) -> _Place:
        residual = problem.residual(a, b) if residual is None else residual
        loss, gradients = problem.loss_and_gradients(a, b, residual)
        return cls(_flat((a, b)), residual, loss, _flat(gradients), a.shape[1])

    @property
    def factors(self) -> Pair:
        return self.split(self.point)

    def split(self, flat: Tensor) -> Pair:
        """`A`- and `B`-shaped views of a flat vector."""
        m, n = self.residual.shape
        return flat[: m * self.rank].view(m, self.rank), flat[m * self.rank :].view(self.rank, n)


@dataclass(frozen=True)
class _Memory:
    """A step, the change of the gradient along it, that change preconditioned, and the product of the first two."""

    step: Tensor
    change: Tensor
    smoothed: Tensor
    curvature: float


def _flat(pair: Pair) -> Tensor:
    return torch.cat([part.reshape(-1) for part in pair])


def _move(problem: WeightedProblem, place: _Place, direction: Tensor, try_whole: bool) -> _Place | None:
    """The place after the whole step if that descends enough, else after the best one; `None` if none descends."""
    slope = float(torch.dot(place.gradient, direction))
    if try_whole:
        found = _Place.at(problem, *place.split(place.point + direction))
        if found.loss <= place.loss + _SUFFICIENT * slope:
            return found
    a, b = place.factors
    da, db = place.split(direction)
    coefficients, p, q = quartic(problem, place.residual, (a, b), (da, db))
    t = best_step(coefficients)
    if t == 0.0:
        return None
    residual = place.residual.add(p, alpha=t).add_(q, alpha=t * t)
    return _Place.at(problem, a + t * da, b + t * db, residual)


class _Preconditioner:
    """The inverse Hessian blocks of the two-sided problem."""

    def __init__(self, problem: WeightedProblem, a: Tensor, b: Tensor) -> None:
        # F has mean 1, so its row and column means multiply to the nearest a bᵀ; the floor keeps unimportant rows
        # from taking unbounded steps.
        rows = problem.importance.mean(1) + _FLOOR
        columns = problem.importance.mean(0) + _FLOOR
        self._rows, self._columns = rows[:, None], columns[None, :]
        # Inverses, not factors: they are applied in every step, and one product is four times as fast as two
        # triangular solves. What rounding does to a preconditioner changes the path, not the optimum.
        self._inverse_a = _inverse((b * columns) @ b.mT) * (problem.total / 2)
        self._inverse_b = _inverse((a.mT * rows) @ a) * (problem.total / 2)

    def __call__(self, gradient: Tensor) -> Tensor:
        size = len(self._rows) * len(self._inverse_a)
        for_a = gradient[:size].view(len(self._rows), -1) / self._rows
        for_b = gradient[size:].view(len(self._inverse_b), -1) / self._columns
        return _flat((for_a @ self._inverse_a, self._inverse_b @ for_b))


def _inverse(gram: Tensor) -> Tensor:
    """The inverse of a positive semi-definite matrix, with as much ridge as it needs; float64 inside."""
    dtype, gram = gram.dtype, gram.double()
    mean = gram.diagonal().mean().clamp(min=torch.finfo(dtype).tiny)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    ridge = _RIDGE
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * mean * identity)
        if int(failed) == 0:
            return torch.cholesky_inverse(factor).to(dtype)
        ridge *= 10


def _direction(gradient: Tensor, smoothed: Tensor, pairs: deque[_Memory]) -> Tensor:
    """The two-loop recursion, from a gradient and the same preconditioned.

    The preconditioner is linear, so it is applied once per place; what the recursion needs of it is put together from
    the memory.
    """
    q, found = gradient.clone(), smoothed.clone()
    weights = []
    for pair in reversed(pairs):
        weight = float(torch.dot(pair.step, q)) / pair.curvature
        weights.append(weight)
        q.sub_(pair.change, alpha=weight)
        found.sub_(pair.smoothed, alpha=weight)
    if pairs:
        last = pairs[-1]
        found.mul_(last.curvature / float(torch.dot(last.change, last.smoothed)))
    for pair, weight in zip(pairs, reversed(weights), strict=True):
        found.add_(pair.step, alpha=weight - float(torch.dot(pair.change, found)) / pair.curvature)
    return found.neg_()
