"""Which samples a process sees, and in which order: similar lengths together in training, each once in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DistributedSampler

_WINDOW = 50
"""Batches that are sorted together: enough for little padding, few enough for different batches in each epoch."""


def grouped_by_length(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator, window: int | None = _WINDOW
) -> list[int]:
    """Orders samples so that consecutive `batch_size` of them have similar lengths.

    Args:
        lengths: Tokens of each sample.
        batch_size: Samples per batch, over all processes.
        generator: Decides which samples meet, and the order of the batches.
        window: Batches that are sorted together, or `None` to sort all samples.

    Returns:
        Every index once. Only the last batch may be incomplete.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = len(order) if window is None else window * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), max(size, 1)):
        chunk = sorted(order[start : start + size], key=lambda index: -lengths[index])
        batches += [chunk[at : at + batch_size] for at in range(0, len(chunk), batch_size)]
    whole = [batch for batch in batches if len(batch) == batch_size]
    rest = [batch for batch in batches if len(batch) < batch_size]
    shuffled = [whole[at] for at in torch.randperm(len(whole), generator=generator).tolist()]
    return [index for batch in [*shuffled, *rest] for index in batch]


class EvaluationSampler(DistributedSampler[int]):
    """Shares out samples in their order, each to one process: nothing counts twice in a score.

    It is a `DistributedSampler` with one process too, so that Lightning does not put its own in its place, which
    repeats samples for all processes to have equally many. Up to one sample more on some processes is harmless
    where no step waits for the others.

    Args:
        size: Samples in the split.
        num_replicas: Processes.
        rank: This process.
    """

    def __init__(self, size: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(size), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self._mine = range(rank, size, num_replicas)
        self.num_samples = len(self._mine)
        self.total_size = size

    def __iter__(self) -> Iterator[int]:
        return iter(self._mine)


class LengthGroupedSampler(DistributedSampler[int]):
    """Shuffles the training split anew in every epoch, the same way in every process.

    It is a `DistributedSampler` with one process too, so that Lightning neither replaces it nor forgets to tell
    it the epoch. As in its parent, with several processes up to `num_replicas - 1` samples come twice in an
    epoch, for all processes to take the same number of steps.

    Args:
        size: Samples in the split.
        batch_size: Samples per batch and process.
        lengths: Tokens of each sample, or `None` to shuffle without regard to length.
        num_replicas: Processes.
        rank: This process.
        seed: With the epoch, decides the order.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        lengths: Sequence[int] | None,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(range(size), num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self._size = size
        self._lengths = lengths
        self._together = batch_size * num_replicas

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self._lengths is None:
            order = torch.randperm(self._size, generator=generator).tolist()
        else:
            order = grouped_by_length(self._lengths, self._together, generator)
        while len(order) < self.total_size:
            order += order[: self.total_size - len(order)]
        return iter(order[self.rank : self.total_size : self.num_replicas])
