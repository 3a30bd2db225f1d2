"""What a static method measures of its layers: one object per kind, which knows how, what it takes, and its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from lowrank_pl.core import LinearShape
from lowrank_pl.errors.numerics import MemoryBoundError
from lowrank_pl.importance.batches import Batch
from lowrank_pl.importance.passes import PerSampleLoss, Reduce


class LayerImportance(ABC):
    """What was measured of one layer: tensors, and what they say."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """By the names that `Importance.layer` takes them back by."""

    @property
    @abstractmethod
    def is_zero(self) -> bool:
        """Whether no loss depended on the layer."""

    @abstractmethod
    def check(self, name: str) -> None:
        """Raises an error for what is not finite, or negative where it may not be, with the layer's name.

        Raises:
            NonFiniteError, ImportanceError: naming layer and entry.
        """


T = TypeVar("T", bound=LayerImportance)


@dataclass(frozen=True)
class Measured(Generic[T]):
    """What was measured of several layers.

    Attributes:
        layers: By fully qualified name.
        num_samples: Over all processes.
    """

    layers: dict[str, T]
    num_samples: int


class Importance(ABC, Generic[T]):
    """A kind of importance. A method that measures something new brings a subclass."""

    needs_data: ClassVar[bool] = True
    """Whether calibration batches are gone through at all."""

    @abstractmethod
    def measure(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Iterable[Batch],
        loss: PerSampleLoss,
        reduce_sum: Reduce | None = None,
        expected: int | None = None,
    ) -> Measured[T]:
        """Measures layers of a model, which is left as it was.

        Args:
            model: The module that `loss` runs.
            layers: Linear layers of it, by name.
            batches: Model inputs on the model's device, first dimension samples. May be gone through twice.
            loss: Maps a batch to the losses of its samples `[b]`, each as if it were alone.
            reduce_sum: Sums a tensor over processes and returns it; called equally often on all of them.
            expected: How many samples the batches of this process hold, for the estimate of the time.

        Raises:
            NonFiniteError: a loss is NaN or Inf, or what was measured of a layer is (it is named).
        """

    @abstractmethod
    def layer(self, tensors: Mapping[str, Tensor]) -> T:
        """Inverse of `LayerImportance.tensors`."""

    @abstractmethod
    def bytes(self, shape: LinearShape) -> int:
        """Memory that measuring a layer of a shape takes at most, besides the passes themselves."""

    def key(self) -> str:
        """Identifies the kind and its options, for caches."""
        return f"{type(self).__name__} {sorted(self.options().items())}"

    def options(self) -> dict[str, Any]:
        """What identifies it in reports, as primitives."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def groups(self, shapes: Mapping[str, LinearShape], max_memory: float | None) -> list[list[str]]:
        """See `memory_groups`."""
        return memory_groups([self], shapes, max_memory)


def memory_groups(
    kinds: Sequence[Importance[Any]], shapes: Mapping[str, LinearShape], max_memory: float | None
) -> list[list[str]]:
    """Divides layers into groups that are measured one after the other, in passes of their own.

    Args:
        kinds: What is measured of a layer and in memory at the same time.
        shapes: The layers.
        max_memory: What one group may take, in GiB; `None`: all layers are one group.

    Raises:
        MemoryBoundError: one layer alone takes more.
    """
    if max_memory is None:
        return [list(shapes)]
    bound = int(max_memory * 2**30)
    groups: list[list[str]] = []
    taken = bound + 1
    for name, shape in shapes.items():
        needed = sum(kind.bytes(shape) for kind in kinds)
        if needed > bound:
            raise MemoryBoundError(max_memory, name, needed)
        if taken + needed > bound:
            groups.append([])
            taken = 0
        groups[-1].append(name)
        taken += needed
    return groups
