"""Gradient descent and its relatives, over both factors at once. W, F: [m, n]; A: [m, r]; B: [r, n]."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from lowrank_pl.core.elementwise.line import minimise_quartic
from lowrank_pl.core.elementwise.problem import WeightedProblem
from lowrank_pl.core.elementwise.solver import ElementwiseSolver, Iterate
from lowrank_pl.errors.numerics import RangeError

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-12
_SWATS_TOLERANCE = 1e-4


class SGD(ElementwiseSolver):
    """Gradient descent with momentum, on full gradients; the step length comes from one exact line search.

    A step that raises the objective above the start is taken back and halves the learning rate.

    Args:
        max_steps: Steps at most.
        momentum: `0 <= momentum < 1`.
        tolerance: Stop after `patience` steps that each improve the objective by less than this share.
    """

    def __init__(self, max_steps: int = 1000, momentum: float = 0.9, tolerance: float = 1e-6) -> None:
        super().__init__(max_steps, tolerance, patience=20)
        if not 0 <= momentum < 1:
            raise RangeError("momentum", momentum, "0 <= momentum < 1")
        self.momentum = momentum

    def iterate(self, problem: WeightedProblem, a: Tensor, b: Tensor) -> Iterator[Iterate]:
        """One gradient per step."""
        residual = problem.residual(a, b)
        gradient = problem.gradients(a, b, residual)
        rate = (1 - self.momentum) * minimise_quartic(problem, residual, (a, b), (-gradient[0], -gradient[1]))
        yield from _descend(problem, (a, b), rate, self.momentum)


def _descend(problem: WeightedProblem, point: tuple[Tensor, Tensor], rate: float, momentum: float) -> Iterator[Iterate]:
    """Heavy-ball descent with a safeguard, from a point."""
    ceiling = problem.loss(*point)
    best, lowest = point, ceiling
    velocity = [torch.zeros_like(p) for p in point]
    a, b = point
    residual = problem.residual(a, b)
    while True:
        gradients = problem.gradients(a, b, residual)
        velocity = [momentum * v + g for v, g in zip(velocity, gradients, strict=True)]
        a, b = a - rate * velocity[0], b - rate * velocity[1]
        residual = problem.residual(a, b)
        loss = problem.loss_of(residual)
        if not math.isfinite(loss) or loss > ceiling:
            rate, velocity = rate / 2, [torch.zeros_like(p) for p in point]
            a, b = best
            residual, loss = problem.residual(a, b), lowest
        elif loss < lowest:
            best, lowest = (a, b), loss
        yield a, b, loss


class Adam(ElementwiseSolver):
    """Adam on full gradients, the learning rate decaying as a half cosine over `max_steps`.

    Args:
        max_steps: Steps; the schedule's length.
        learning_rate: Relative to the mean absolute entry of the factors, so that it fits any weight, `> 0`.
        tolerance: 0 by default: with a schedule, stopping early loses its best part.

    References:
        Kingma and Ba, Adam: a method for stochastic optimization, ICLR 2015, algorithm 1.
    """

    def __init__(self, max_steps: int = 300, learning_rate: float = 0.01, tolerance: float = 0.0) -> None:
        super().__init__(max_steps, tolerance, patience=20)
        _check_rate(learning_rate)
        self.learning_rate = learning_rate

    def iterate(self, problem: WeightedProblem, a: Tensor, b: Tensor) -> Iterator[Iterate]:
        """One gradient per step."""
        base = self.learning_rate * float((a.abs().mean() + b.abs().mean()) / 2)
        state = _AdamState(a, b)
        step = 0
        while True:
            rate = base * 0.5 * (1 + math.cos(math.pi * min(step / self.max_steps, 1.0)))
            a, b, loss = state.step(problem, rate)
            step += 1
            yield a, b, loss


class AdamSGD(ElementwiseSolver):
    """Adam first, gradient descent after: rapid progress, then steady convergence.

    The rule of the paper that proposes the hybrid is not public; two are offered. `swats` switches when the learning
    rate with which gradient descent would have made Adam's step, projected on that step, has settled. `fraction`
    switches after a fixed share of the steps and is the control.

    Args:
        max_steps: Steps at most, both phases together.
        learning_rate: Of the Adam phase, relative to the mean absolute entry of the factors, `> 0`.
        switch: The rule.
        fraction: Share of `max_steps` for the Adam phase under `fraction`; the latest switch under `swats`.
        tolerance: Stop after 20 steps in a row that each improve the objective by less than this share.

    References:
        Hua et al., Numerical optimizations for weighted low-rank estimation on language models, EMNLP 2022 (the
        hybrid). Keskar and Socher, Improving generalization performance by switching from Adam to SGD,
        arXiv:1712.07628, algorithm 1 (`swats`).
    """

    def __init__(
        self,
        max_steps: int = 600,
        learning_rate: float = 0.01,
        switch: Literal["swats", "fraction"] = "swats",
        fraction: float = 0.5,
        tolerance: float = 1e-6,
    ) -> None:
        super().__init__(max_steps, tolerance, patience=20)
        _check_rate(learning_rate)
        if switch not in ("swats", "fraction"):
            raise RangeError("switch", switch, "'swats' or 'fraction'")
        if not 0 < fraction < 1:
            raise RangeError("fraction", fraction, "0 < fraction < 1, the Adam phase's share of the steps")
        self.learning_rate = learning_rate
        self.switch = switch
        self.fraction = fraction

    def iterate(self, problem: WeightedProblem, a: Tensor, b: Tensor) -> Iterator[Iterate]:
        """One gradient per step."""
        rate = self.learning_rate * float((a.abs().mean() + b.abs().mean()) / 2)
        state = _AdamState(a, b)
        average = found = 0.0
        for step in range(1, int(self.fraction * self.max_steps) + 1):
            before = (a, b)
            a, b, loss = state.step(problem, rate)
            yield a, b, loss
            moved = (a - before[0], b - before[1])
            along = sum(float((p * g).sum()) for p, g in zip(moved, state.gradients, strict=True))
            if along < 0:
                projected = sum(float(p.square().sum()) for p in moved) / -along
                average = _BETA2 * average + (1 - _BETA2) * projected
                found = average / (1 - _BETA2**step)
                if self.switch == "swats" and step > 1 and abs(found - projected) < _SWATS_TOLERANCE * found:
                    break
        yield from _descend(problem, (a, b), (1 - _BETA1) * found, _BETA1)


class _AdamState:
    """Moments and the point that they belong to."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self._point = [a, b]
        self._first = [torch.zeros_like(p) for p in self._point]
        self._second = [torch.zeros_like(p) for p in self._point]
        self._steps = 0
        self._residual: Tensor | None = None
        self.gradients: tuple[Tensor, Tensor] = (a, b)

    def step(self, problem: WeightedProblem, rate: float) -> Iterate:
        """Moves the point; returns it with the objective after the move."""
        a, b = self._point
        residual = problem.residual(a, b) if self._residual is None else self._residual
        self.gradients = problem.gradients(a, b, residual)
        self._steps += 1
        correct1, correct2 = 1 - _BETA1**self._steps, 1 - _BETA2**self._steps
        for index, gradient in enumerate(self.gradients):
            first, second = self._first[index], self._second[index]
            first.mul_(_BETA1).add_(gradient, alpha=1 - _BETA1)
            second.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            scale = (second / correct2).sqrt_().add_(_EPSILON)
            self._point[index] = self._point[index] - rate / correct1 * first / scale
        self._residual = problem.residual(*self._point)
        return self._point[0], self._point[1], problem.loss_of(self._residual)


def _check_rate(learning_rate: float) -> None:
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise RangeError("learning_rate", learning_rate, "0 < learning_rate, relative to the factors' entries")
