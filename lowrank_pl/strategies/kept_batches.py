"""Calibration batches that lie in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import torch

from lowrank_pl.contract import choose
from lowrank_pl.importance import identity
from lowrank_pl.importance.batches import Batch, batch_size, mapped, selected, split


class KeptBatches:
    """Batches of any structure that are read once: a `CalibrationSource`.

    Args:
        batches: Samples along the first dimension of every tensor.

    Attributes:
        batch_size: Samples in the largest.

    Raises:
        BatchShapeError: a batch does not tell its samples apart.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        # No graph can be built on tensors of inference mode.
        self._batches = [mapped(batch, lambda t: t.clone() if t.is_inference() else t) for batch in batches]
        self._sizes = [batch_size(batch) for batch in self._batches]
        self.batch_size = max(self._sizes, default=1)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the batches themselves."""
        return identity(self._batches)

    def calibration_batches(
        self,
        batch_size: int,
        max_samples: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Chosen:
        """The batches as they were given, or smaller ones where that is asked for; see `CalibrationSource`."""
        total = sum(self._sizes)
        chosen = choose(total, max_samples, seed)
        marks = torch.zeros(total, dtype=torch.bool)
        marks[chosen[rank::world_size]] = True
        found: list[Batch] = []
        for batch, mark in zip(self._batches, marks.split(self._sizes), strict=True):
            if not bool(mark.any()):
                continue  # models seldom take a batch without samples
            part = batch if bool(mark.all()) else selected(batch, mark.nonzero().squeeze(1))
            found.extend([part] if int(mark.sum()) <= batch_size else split(part, batch_size))
        return Chosen(found, len(chosen), f"{self.fingerprint} {max_samples} {seed}")


class Chosen:
    """A `CalibrationBatches` over a list.

    Args:
        batches: Of this process.
        num_samples: Over all processes.
        fingerprint: Identifies the samples.
    """

    def __init__(self, batches: list[Batch], num_samples: int, fingerprint: str) -> None:
        self.num_samples = num_samples
        self.fingerprint = fingerprint
        self._batches = batches

    def __len__(self) -> int:
        """Number of batches of this process."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches."""
        return iter(self._batches)
