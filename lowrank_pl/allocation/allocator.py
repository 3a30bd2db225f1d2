"""Who decides the ranks of a static method: an object that turns shapes, energies and a budget into ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lowrank_pl.allocation.measure import Measure, Parameters
from lowrank_pl.allocation.uniform import Allocation, LayerOverride, uniform_ranks
from lowrank_pl.core.shapes import LinearShape


@dataclass(frozen=True)
class RankRequest:
    """What ranks are asked for.

    Attributes:
        shapes: The targeted layers.
        keep_ratio: Share of what they cost when dense that may be kept.
        rank_ratio: Instead, the papers' `int(rank_ratio · min(out, in))`; a budget over all layers is what these cost.
        multiple_of: Ranks are to be multiples.
        overrides: Exceptions by name, which neither draw from nor add to what the other layers get.
        cost: What ranks cost.
    """

    shapes: Mapping[str, LinearShape]
    keep_ratio: float | None = None
    rank_ratio: float | None = None
    multiple_of: int = 1
    overrides: Sequence[LayerOverride] = ()
    cost: Measure = field(default_factory=Parameters)

    def uniform(self) -> Allocation:
        """The same share for every layer; raises an error for impossible requests. See `uniform_ranks`."""
        return uniform_ranks(self.shapes, self.keep_ratio, self.rank_ratio, self.multiple_of, self.overrides, self.cost)


class Allocator(ABC):
    """Decides which layer gets which rank."""

    needs_energies: ClassVar[bool] = False
    """Whether ranks depend on the energies of the layers' groups, which are known only after calibration."""

    @abstractmethod
    def allocate(self, request: RankRequest, energies: Mapping[str, Tensor]) -> Allocation:
        """Ranks for a request.

        Args:
            request: Shapes and budget.
            energies: Per layer, by how much the loss rises without each group, `[min(m, n)]`, non-increasing; in one
                unit for all layers. Empty where `needs_energies` is false.

        Raises:
            LowRankError: an impossible request; the subclasses are those of `uniform_ranks`.
        """

    def options(self) -> dict[str, Any]:
        """What identifies it in reports, as primitives."""
        return {"class": type(self).__name__, **vars(self)}


class Uniform(Allocator):
    """The same share of its cost for every layer."""

    def allocate(self, request: RankRequest, energies: Mapping[str, Tensor]) -> Allocation:
        """See `uniform_ranks`."""
        del energies
        return request.uniform()
