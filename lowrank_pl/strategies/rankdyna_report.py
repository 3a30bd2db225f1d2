"""What a run whose ranks shrink tells of itself: before it starts, on the way, and in its record."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_pl.allocation import CubicCurve
from lowrank_pl.strategies.rank_plan import RankPlan
from lowrank_pl.strategies.rank_state import RankState
from lowrank_pl.surgery import CompressionRecord, CostRecord

logger = logging.getLogger(__name__)


def told_of(method: str, plan: RankPlan, curve: CubicCurve, steps: int, observed: int, reallocating: int) -> list[str]:
    """What a run of some length will do and take.

    Args:
        method: Its name.
        plan: Its frame.
        curve: Its schedule.
        steps: Optimizer steps.
        observed: Bytes of what is observed.
        reallocating: Bytes that a reallocation takes on top of that.
    """
    share = plan.budget / plan.dense_cost
    spent = f"{plan.budget:,} of {plan.dense_cost:,} {plan.cost.measure.unit} of {len(plan.shapes)} layers"
    actions = ", ".join(f"{step:,}" for step in curve.actions())
    told = [
        f"{method}: the budget is {spent} (keep_ratio {share:.4f})",
        f"ranks are reallocated after steps {actions} of {steps:,}; the last one reaches the budget",
    ]
    if observed:
        more = f", and a reallocation {reallocating / 2**20:,.1f} MiB more" if reallocating else ""
        told.append(f"until then, what is observed takes up to {observed / 2**20:,.1f} MiB{more}")
    return told


def record_of(
    method: str, options: dict[str, Any], plan: RankPlan, state: RankState, ranks: Mapping[str, int]
) -> CompressionRecord:
    """The model at some ranks, as reports and checkpoints keep it."""
    unit, notes = plan.cost.measure.unit, []
    if not state.reached:
        notes.append(f"the budget of {state.budget:,} {unit} has not been reached")
    if state.skipped:
        notes.append(f"{state.skipped} optimizer steps with gradients that are not finite were left out")
    if state.worthless:
        told = f"{len(state.worthless)} layers, e.g. {state.worthless[0]!r}"
        notes.append(f"no loss depends on {told}: they got the lowest ranks that there are")
    cost = CostRecord(unit, plan.kept(ranks), plan.dense_cost)
    return CompressionRecord(method, options, plan.records(ranks), tuple(notes), state.reached, cost)


def warn_of_worthless(before: Sequence[str], names: Sequence[str]) -> None:
    """Warns of layers without any score, where there are more: not called, or not in a way that can be observed."""
    if set(names) - set(before):
        logger.warning(
            "no loss depends on %d targeted layers, e.g. %r: they get the lowest ranks there are; to keep them "
            "dense leave them out through model.init_args.strategy.init_args.targets.exclude",
            *(len(names), names[0]),
        )
