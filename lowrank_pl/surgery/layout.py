"""What a checkpoint must know about the shapes of a model, so that it loads without any strategy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lowrank_pl.errors.model import CheckpointMismatchError, LayoutVersionError
from lowrank_pl.nn import LowRankLinear, SVDLinear
from lowrank_pl.surgery.convert import empty_linear_like
from lowrank_pl.surgery.swap import replace_module_

LAYOUT_VERSION = 1
LOW_RANK = "low_rank"
SINGULAR_GROUPS = "singular_groups"
_LINEARS = (nn.Linear, LowRankLinear, SVDLinear)


@dataclass(frozen=True)
class ModelLayout:
    """Kind and size of every module that is not what the architecture's own code builds.

    Attributes:
        modules: `{fully qualified name: (kind, size)}`. `"low_rank"`: two factors, its size the rank.
            `"singular_groups"`: a layer whose rank still shrinks in training, its size the capacity.
    """

    modules: dict[str, tuple[str, int]]

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for checkpoints and JSON."""
        return {
            "version": LAYOUT_VERSION,
            "modules": {name: [kind, size] for name, (kind, size) in self.modules.items()},
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelLayout:
        """Inverse of `to_dict`.

        Raises:
            LayoutVersionError: written by an incompatible release.
        """
        if fields.get("version") != LAYOUT_VERSION:
            raise LayoutVersionError(fields.get("version"), LAYOUT_VERSION)
        return cls({name: (str(kind), int(size)) for name, (kind, size) in fields["modules"].items()})

    def difference(self, other: ModelLayout) -> str:
        """The first differences to another layout, in words; empty when equal."""
        names = sorted(self.modules.keys() | other.modules.keys())
        different = [n for n in names if self.modules.get(n) != other.modules.get(n)]
        if not different:
            return ""
        name = different[0]
        mine, theirs = (layout.modules.get(name, ("dense", 0)) for layout in (self, other))
        return f"{len(different)} layers, e.g. {name!r} is {mine[0]} {mine[1]} against {theirs[0]} {theirs[1]}"


def read_layout(model: nn.Module) -> ModelLayout:
    """Reads the layout off a model."""
    found = {name: _size(module) for name, module in model.named_modules()}
    return ModelLayout({name: size for name, size in found.items() if size is not None})


def compacted(layout: ModelLayout, ranks: Mapping[str, int], dense: Collection[str] = ()) -> ModelLayout:
    """The layout that `compact_` leaves behind.

    Args:
        layout: With layers in singular groups.
        ranks: Of those layers.
        dense: Those that become dense.
    """
    modules = {}
    for name, (kind, size) in layout.modules.items():
        if kind != SINGULAR_GROUPS:
            modules[name] = (kind, size)
        elif name not in dense:
            modules[name] = (LOW_RANK, ranks[name])
    return ModelLayout(modules)


def conform_(model: nn.Module, layout: ModelLayout, source: str = "the checkpoint") -> None:
    """Gives a model the shapes of a layout, in place; values are left to the state dict that follows.

    Layers that already have the right shape are not touched. No optimizer may exist.

    Raises:
        CheckpointMismatchError: the layout names a module that the model lacks or that is no linear layer.
    """
    modules = dict(model.named_modules())
    for name, (kind, _) in layout.modules.items():
        if kind not in (LOW_RANK, SINGULAR_GROUPS) or not isinstance(modules.get(name), _LINEARS):
            found = type(modules[name]).__name__ if name in modules else "nothing"
            raise CheckpointMismatchError(source, f"it has a {kind} layer at {name!r}, where the model has {found}")
    for name, module in modules.items():
        if isinstance(module, _LINEARS) and _size(module) != layout.modules.get(name):
            replace_module_(model, name, _empty(module, layout.modules.get(name)))


def _size(module: nn.Module) -> tuple[str, int] | None:
    if isinstance(module, LowRankLinear):
        return LOW_RANK, module.rank
    if isinstance(module, SVDLinear):
        return SINGULAR_GROUPS, module.capacity
    return None


def _empty(module: nn.Linear | LowRankLinear | SVDLinear, wanted: tuple[str, int] | None) -> nn.Module:
    """An empty layer of a kind and size, in the place of another."""
    dense = module if isinstance(module, nn.Linear) else empty_linear_like(module)
    if wanted is None:
        return dense
    kind, size = wanted
    return LowRankLinear.like(dense, size) if kind == LOW_RANK else SVDLinear.like(dense, size)
