"""Factors written into the layers that stand for dense ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowrank_pl.core import relative_error
from lowrank_pl.core.elementwise.solver import DIVERGED
from lowrank_pl.nn import LayerForm, dense_shape, dense_weight, two_factors
from lowrank_pl.strategies.decomposition import Factorised


def empty_factors(layer: nn.Module, rank: int) -> LayerForm:
    """The form in two factors that stands for a dense layer at a rank, with its bias and zeros."""
    return two_factors(dense_shape(layer)).empty({"rank": rank}, layer)


def write_factors(name: str, layer: nn.Module, made: LayerForm, found: Factorised) -> tuple[dict[str, Any], str | None]:
    """Writes factors into an empty layer; returns the fields of its record, and a note."""
    made.assign_(found.factors)
    record = {
        "error": relative_error(dense_weight(layer).detach(), found.factors.product()),
        "weighted_error": found.weighted_error,
        "losses": found.losses,
        "outcome": found.outcome,
    }
    if found.outcome is not None and found.outcome.startswith(DIVERGED):
        return record, f"the solver of {name!r} {found.outcome}: the best of its iterates is used"
    return record, None
