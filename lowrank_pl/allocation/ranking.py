"""Singular groups ranked across all layers, and as many kept as a budget pays for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.numerics import RangeError, ShapeError


@dataclass(frozen=True)
class RankBounds:
    """How few and how many groups a layer may keep, `1 <= low <= high`."""

    low: int = 1
    high: int | None = None


def globally_ranked(
    scores: Mapping[str, Tensor],
    shapes: Mapping[str, LinearShape],
    budget: float,
    bounds: Mapping[str, RankBounds] | None = None,
    per_parameter: bool = False,
) -> dict[str, Tensor]:
    """Keeps the groups with the highest scores of all layers together, strictly within a budget of parameters.

    Every layer first gets its best `low` groups. The others follow in the order of their scores, ties in the order of
    layers and groups, each if the budget still pays for it (`m + n` parameters, see `LinearShape`).

    Args:
        scores: Per layer, one score per group that there still is, `[c]`.
        shapes: Of the same layers.
        budget: Parameters that all groups kept may cost together.
        bounds: Of some layers; 1 to all otherwise.
        per_parameter: Rank by score divided by the group's parameters.

    Returns:
        Per layer the indices of the groups to keep, ascending, on the CPU.

    Raises:
        ShapeError: scores and shapes are of different layers, or a layer has no group.
        RangeError: the budget does not pay for the lowest ranks.
    """
    if scores.keys() != shapes.keys() or any(score.numel() == 0 for score in scores.values()):
        raise ShapeError("scores", (len(scores),), f"one non-empty score per layer, {len(shapes)} layers")
    allowed = {name: (bounds or {}).get(name, RankBounds()) for name in scores}
    orders: dict[str, list[int]] = {}
    candidates: list[tuple[float, str, int]] = []
    spent = 0
    for name, score in scores.items():
        cost = shapes[name].params_per_rank
        values = score.detach().double().cpu()
        order = torch.sort(values, descending=True, stable=True).indices.tolist()
        low = min(allowed[name].low, len(order))
        orders[name] = order[:low]
        spent += low * cost
        scale = cost if per_parameter else 1
        candidates += [(float(values[index]) / scale, name, index) for index in order[low : allowed[name].high]]
    if spent > budget:
        raise RangeError("budget", budget, f"at least {spent:,} parameters, what the lowest ranks cost")
    cheapest = min(shape.params_per_rank for shape in shapes.values())
    # Python's sort is stable: equal scores stay in the order of layers.
    for _, name, index in sorted(candidates, key=lambda candidate: -candidate[0]):
        cost = shapes[name].params_per_rank
        if spent + cost <= budget:
            orders[name].append(index)
            spent += cost
        elif spent + cheapest > budget:
            break
    return {name: torch.tensor(sorted(order)) for name, order in orders.items()}
