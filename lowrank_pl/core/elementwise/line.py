"""Exact line search: along a direction of both factors the objective is a polynomial of degree four."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_pl.core.elementwise.problem import WeightedProblem, dot

Pair = tuple[Tensor, Tensor]


def quartic(
    problem: WeightedProblem, residual: Tensor, point: Pair, direction: Pair
) -> tuple[list[float], Tensor, Tensor]:
    """Coefficients `c_0 … c_4` of `t ↦ loss(A + t dA, B + t dB)`, and the residual's own two coefficients.

    The residual moves as `R + t P + t² Q` with `P = dA B + A dB` and `Q = dA dB`.
    """
    (a, b), (da, db) = point, direction
    p = torch.addmm(da @ b, a, db)
    q = da @ db
    f_r, f_p = problem.importance * residual, problem.importance * p
    inner = [
        dot(f_r, residual),
        2 * dot(f_r, p),
        dot(f_p, p) + 2 * dot(f_r, q),
        2 * dot(f_p, q),
        dot(problem.importance * q, q),
    ]
    return [value / problem.total for value in inner], p, q


def best_step(coefficients: list[float]) -> float:
    """The `t >= 0` with the lowest value of the polynomial; 0 where no step descends."""

    def value(t: float) -> float:
        return sum(c * t**power for power, c in enumerate(coefficients))

    slope = [power * c for power, c in enumerate(coefficients)][1:]
    candidates = [0.0, *(root for root in _real_roots(slope) if root > 0)]
    return min(candidates, key=value)


def _real_roots(coefficients: list[float]) -> list[float]:
    """Real roots of a polynomial, lowest power first, as eigenvalues of its companion matrix."""
    largest = max(abs(c) for c in coefficients)
    if not math.isfinite(largest):
        return []
    while coefficients and abs(coefficients[-1]) <= 1e-14 * largest:
        coefficients = coefficients[:-1]
    degree = len(coefficients) - 1
    if degree < 1:
        return []
    companion = torch.diag(torch.ones(degree - 1, dtype=torch.float64), -1)
    companion[:, -1] = -torch.tensor(coefficients[:-1], dtype=torch.float64) / coefficients[-1]
    roots = torch.linalg.eigvals(companion)
    return [float(root.real) for root in roots if abs(root.imag) < 1e-9 * (1 + abs(root))]


def minimise_quartic(problem: WeightedProblem, residual: Tensor, point: Pair, direction: Pair) -> float:
    """The best step along a direction."""
    return best_step(quartic(problem, residual, point, direction)[0])
