"""State dicts whose layout has version 1: their factors were parameters of the layer, not of two linears in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lowrank_pl.nn import LowRankLinear
from lowrank_pl.surgery.convert import places_of

_NAMES = {"left": "left.weight", "bias": "left.bias", "right": "right.weight"}


def current_names(state: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """A model's state dict with the names that its layers in two factors have today.

    Args:
        state: Of a model.
        fields: The layout beside it, as it lies on disk, of any version that is read.
    """
    found = dict(state)
    if fields.get("version") != 1:
        return found
    for name, (kind, _) in fields["modules"].items():
        if kind != LowRankLinear.name or f"{name}.left" not in state:
            continue  # missing: comparing keys tells, with the names of today
        for place in list(places_of(state, name)):
            for old, new in _NAMES.items():
                if f"{place}.{old}" in found:
                    found[f"{place}.{new}"] = found.pop(f"{place}.{old}")
    return found
