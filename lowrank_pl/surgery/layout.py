"""What a checkpoint must know about the shapes of a model, so that it loads without any strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lowrank_pl.errors.model import CheckpointMismatchError, LayoutVersionError
from lowrank_pl.nn import LowRankLinear
from lowrank_pl.surgery.convert import empty_linear_like
from lowrank_pl.surgery.swap import replace_module_

LAYOUT_VERSION = 1
LOW_RANK = "low_rank"


@dataclass(frozen=True)
class ModelLayout:
    """Kind and size of every module that is not what the architecture's own code builds.

    Attributes:
        modules: `{fully qualified name: (kind, size)}`; the only kind so far is `"low_rank"`, its size the rank.
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
    return ModelLayout({name: (LOW_RANK, m.rank) for name, m in model.named_modules() if isinstance(m, LowRankLinear)})


def conform_(model: nn.Module, layout: ModelLayout, source: str = "the checkpoint") -> None:
    """Gives a model the shapes of a layout, in place; values are left to the state dict that follows.

    Layers that already have the right shape are not touched. No optimizer may exist.

    Raises:
        CheckpointMismatchError: the layout names a module that the model lacks or that is no linear layer.
    """
    modules = dict(model.named_modules())
    for name, (kind, _) in layout.modules.items():
        if kind != LOW_RANK or not isinstance(modules.get(name), (nn.Linear, LowRankLinear)):
            found = type(modules[name]).__name__ if name in modules else "nothing"
            raise CheckpointMismatchError(source, f"it has a {kind} layer at {name!r}, where the model has {found}")
    for name, module in modules.items():
        wanted = layout.modules.get(name)
        if wanted is None and isinstance(module, LowRankLinear):
            replace_module_(model, name, empty_linear_like(module))
        elif wanted is not None and isinstance(module, (nn.Linear, LowRankLinear)):
            rank = wanted[1]
            if not (isinstance(module, LowRankLinear) and module.rank == rank):
                replace_module_(model, name, LowRankLinear.like(module, rank))
