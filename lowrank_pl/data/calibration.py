"""Batches of the training split for calibration, the same every time they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset
from torch import Tensor

from lowrank_pl.data.collate import Collator


def choose(size: int, at_most: int | None, seed: int) -> list[int]:
    """Chooses samples at random, without moving the global random state.

    Args:
        size: Samples there are.
        at_most: Samples to choose, or `None` for all.
        seed: Decides the choice.

    Returns:
        Indices in ascending order.
    """
    if at_most is None or at_most >= size:
        return list(range(size))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:at_most].tolist())


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
