"""Batches of the training split for calibration, the same every time they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from datasets import Dataset
from torch import Tensor
from torch.utils.data import default_collate

from lowrank_pl.contract import choose
from lowrank_pl.data.collate import Collator
from lowrank_pl.importance import identity


class SortedBatches:
    """A `CalibrationBatches`: chosen samples by length, every `world_size`-th of them for this process.

    Args:
        dataset: The tokenised training split.
        chosen: Indices of the samples over all processes.
        lengths: Tokens of every sample of `dataset`.
        batch_size: Samples per batch and process.
        collate: Makes a batch; must not be random.
        fingerprint: Identifies all of the above.
        rank: This process.
        world_size: Processes.

    Attributes:
        num_samples: Samples over all processes together.
        fingerprint: As given.
    """

    def __init__(
        self,
        dataset: Dataset,
        chosen: Sequence[int],
        lengths: Sequence[int],
        batch_size: int,
        collate: Collator,
        fingerprint: str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_samples = len(chosen)
        self.fingerprint = fingerprint
        self._dataset = dataset
        self._collate = collate
        mine = sorted(chosen, key=lambda index: lengths[index])[rank::world_size]
        self._batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        """Number of batches of this process."""
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yields model inputs and `labels` on the CPU."""
        for indices in self._batches:
            yield self._collate(self._dataset.__getitems__(indices))


class DatasetBatches:
    """A `CalibrationBatches` over a map-style dataset of anybody's, for `calibration_batches` of their datamodule.

    Args:
        dataset: The training split: has a length, and gives the same sample for an index every time.
        batch_size: Samples per batch and process.
        max_samples: Take a seeded random choice of so many samples; `None` for all.
        seed: Of that choice.
        rank: This process.
        world_size: Processes.
        collate: Makes a batch of a list of samples, by default that of `DataLoader`; must not be random.

    Attributes:
        num_samples: Samples over all processes together.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        max_samples: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self._dataset = dataset
        self._chosen = choose(len(dataset), max_samples, seed)
        self._collate = collate
        self.num_samples = len(self._chosen)
        mine = self._chosen[rank::world_size]
        self._batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the samples themselves, of all processes; reads each of them."""
        return identity(*(identity(self._dataset[index]) for index in self._chosen), self._collate)

    def __len__(self) -> int:
        """Number of batches of this process."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        """Yields what `collate` makes of the samples."""
        for indices in self._batches:
            yield self._collate([self._dataset[index] for index in indices])
