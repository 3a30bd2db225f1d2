"""What can be factorised in a model, what it costs, and what a budget gives, as text."""

from __future__ import annotations

from torch import nn

from lowrank_pl.allocation import Allocation, Measure, Parameters
from lowrank_pl.allocation.uniform import floor_cost
from lowrank_pl.checkpoint import is_quantized
from lowrank_pl.core import LinearShape
from lowrank_pl.errors import LowRankError
from lowrank_pl.nn import LinearForm, dense_shape, forms_in
from lowrank_pl.strategies import CompressionStrategy
from lowrank_pl.surgery.targets import TARGETED

_IN_INT8 = "in int8, rounded: nothing to factorise"


def inspect_model(encoder: nn.Module, strategy: CompressionStrategy) -> str:
    """A table of every linear layer and a summary.

    Args:
        encoder: What would be compressed.
        strategy: Whose targets and plan are shown.

    Returns:
        Text with one line per layer: shape, dense parameters, cost of the first rank, break-even rank, planned rank and
        parameters in the strategy's form, or why the layer stays dense; then the floor of the whole model and the
        plan's totals.
    """
    reasons = strategy.targets.explain(encoder)
    if is_quantized(encoder):
        reasons = {name: _IN_INT8 if reason == TARGETED else reason for name, reason in reasons.items()}
    shapes = {name: _shape(encoder, name) for name in reasons}
    targets = {name: shapes[name] for name, reason in reasons.items() if reason == TARGETED}
    plan = _plan(encoder, strategy)
    planned = Parameters().in_form(strategy.measure.form)
    header = ("layer", "out", "in", "dense", "per rank", "break-even", "rank", "kept", "status")
    rows: list[tuple[str, ...]] = [header]
    for name, shape in shapes.items():
        rank, kept = _planned(plan, name)
        status = reasons[name]
        if status == TARGETED and planned.factored(shape, 1) >= shape.dense_params:
            status = "targeted, infeasible: one rank costs as much as the dense weight"
        rows.append((name, *_sizes(shape, planned), rank, kept, status))
    for name, form in forms_in(encoder).items():
        kept = f"{form.parameters_of(form.spec(), form.shape):,}"
        parameters = Parameters().in_form(type(form)) if form.is_final and isinstance(form, LinearForm) else planned
        status = f"factorised already ({form.name})"
        rows.append((name, *_sizes(form.shape, parameters), str(form.rank), kept, status))
    return "\n".join([_table(rows), "", *_summary(encoder, strategy, targets, plan)])


def _plan(encoder: nn.Module, strategy: CompressionStrategy) -> Allocation | None:
    """The plan; `None` where there is none before training, and where none is possible."""
    if is_quantized(encoder):
        return None  # shapes alone would do
    try:
        return strategy.plan(encoder)
    except LowRankError:
        return None


def _sizes(shape: LinearShape, parameters: Measure) -> tuple[str, ...]:
    sizes = (shape.out_features, shape.in_features, shape.dense_params, parameters.factored(shape, 1))
    return (*(f"{size:,}" for size in sizes), str(parameters.break_even(shape)))


def _planned(plan: Allocation | None, name: str) -> tuple[str, str]:
    if plan is None or name not in plan.ranks:
        return "", ""
    rank = plan.ranks[name]
    return "dense" if rank is None else str(rank), f"{plan.parameters(name):,}"


def _summary(
    encoder: nn.Module, strategy: CompressionStrategy, targets: dict[str, LinearShape], plan: Allocation | None
) -> list[str]:
    total = sum(parameter.numel() for parameter in encoder.parameters())
    dense = sum(shape.dense_params for shape in targets.values())
    measure = strategy.measure
    whole = measure.total_dense(targets)
    floor = floor_cost(targets, measure)
    lines = [f"model: {type(encoder).__name__}, {total:,} parameters"]
    if targets:
        lines += [
            f"targeted: {len(targets)} layers, {dense:,} parameters ({dense / total:.1%} of the model)",
            f"floor: {floor:,} of {whole:,} {measure.unit} of the targeted layers: no keep_ratio can go below "
            f"{floor / whole:.4f}",
        ]
    if plan is not None:
        after = total - plan.dense + plan.kept
        low = sum(rank is not None for rank in plan.ranks.values())
        lines.append(
            f"{type(strategy).__name__}: {low} layers factorised, {len(plan.ranks) - low} dense; keeps "
            f"{plan.kept:,} of {plan.dense:,} parameters ({_share(plan.kept, plan.dense, measure)}), "
            f"{after:,} parameters in all"
        )
        if not isinstance(measure, Parameters):
            spent = plan.total_cost(measure)
            lines.append(f"cost: {spent:,} of {whole:,} {measure.unit} (keep_ratio {spent / whole:.4f})")
    if plan is not None and strategy.plan_depends_on_data:
        lines.append("ranks follow from the calibration data; those above are uniform ones of the same budget")
    return lines


def _share(kept: int, dense: int, measure: Measure) -> str:
    """Of parameters; it is the keep_ratio only where the budget is in parameters."""
    return f"{'keep_ratio' if isinstance(measure, Parameters) else 'a share of'} {kept / dense:.4f}"


def _shape(encoder: nn.Module, name: str) -> LinearShape:
    return dense_shape(encoder.get_submodule(name))


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = (0, len(widths) - 1)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
