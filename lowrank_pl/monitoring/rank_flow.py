"""Where a model keeps its capacity while its ranks shrink: pictures of a history of reallocations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_pl.core import LinearShape
from lowrank_pl.monitoring.rank_picture import grid_position
from lowrank_pl.strategies import RankPlan, Reallocation

Shapes = Mapping[str, LinearShape]


def kept_by_kind(plan: RankPlan, ranks: Mapping[str, int]) -> dict[str, int]:
    """Parameters by kind of matrix, e.g. of all query projections together."""
    kept: dict[str, int] = {}
    for layer in plan.records(ranks):
        kind = grid_position(layer.name)[1]
        kept[kind] = kept.get(kind, 0) + layer.parameters
    return kept


def dense_parameters(shapes: Shapes) -> int:
    """Parameters of the targeted weights when dense."""
    return sum(shape.dense_params for shape in shapes.values())


def flow_figure(plan: RankPlan, history: Sequence[Reallocation], last_step: int) -> Any:
    """Kept against scheduled share over the steps up to the last, and how parameters divide among kinds of matrices.

    Returns:
        A matplotlib figure without a window.
    """
    from matplotlib.figure import Figure

    dense = dense_parameters(plan.shapes)
    start = kept_by_kind(plan, plan.capacities)
    reallocations = [entry.step for entry in history]
    steps = [0, *reallocations, last_step]
    flow = [start, *(kept_by_kind(plan, entry.ranks) for entry in history)]
    flow.append(flow[-1])
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    kept = [plan.start_cost, *(entry.kept for entry in history)]
    left.step(steps, [cost / plan.dense_cost for cost in [*kept, kept[-1]]], where="post", label="kept")
    scheduled = [entry.scheduled / plan.dense_cost for entry in history]
    left.plot(reallocations, scheduled, "k.", markersize=3, label="scheduled")
    left.set_xlabel("optimizer step")
    left.set_ylabel(f"{plan.cost.measure.unit} / those of the dense layers")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3)
    right.stackplot(steps, [[kinds[kind] / dense for kinds in flow] for kind in start], labels=list(start), step="post")
    right.set_xlabel("optimizer step")
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    right.set_ylabel("parameters / dense targeted parameters")
    right.set_title("by kind of matrix", fontsize=9)
    return figure
