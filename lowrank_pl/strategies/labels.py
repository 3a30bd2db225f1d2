"""Labels of the calibration samples: the data's own, or drawn from what the model predicts. b: samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, Protocol, get_args, runtime_checkable

import lightning.pytorch as pl
import torch
from torch import Tensor

from lowrank_pl.errors.labels import LabelsError
from lowrank_pl.importance.batches import Batch, batch_size, split
from lowrank_pl.importance.frozen import frozen_eval
from lowrank_pl.importance.memory import is_out_of_memory, release_memory

Labels = Literal["observed", "sampled"]
LABELS: tuple[str, ...] = get_args(Labels)

Uniform = Callable[[int], Tensor]
"""So many numbers between 0 and 1, float64, on the CPU; every call gives new ones."""


@runtime_checkable
class DrawsLabels(Protocol):
    """A task that can draw labels from the distribution of which its loss is the negative logarithm."""

    def drawn_labels(self, outputs: Tensor, batch: Batch, uniform: Uniform) -> Tensor:
        """Labels as `per_sample_losses` takes them.

        Args:
            outputs: What the module put out for the batch, float32.
            batch: Model inputs; `labels` may be missing, and are read only for which tokens have one.
            uniform: The source of randomness, asked for one number per label, in the order of samples: the labels then
                do not depend on how samples are divided into batches.

        Raises:
            LabelsError: what is to be labelled cannot be told.
        """
        ...


def check_labels(pl_module: pl.LightningModule, labels: Labels) -> None:
    """Raises an error for labels to be drawn for a module that does not say how.

    Raises:
        LabelsError: so it is.
    """
    if labels == "sampled" and not isinstance(pl_module, DrawsLabels):
        problem = "labels were to be sampled, and it has no method drawn_labels, which says what its loss implies"
        raise LabelsError(type(pl_module).__name__, problem, "observed")


class ObservedLabels:
    """Batches as they are, which have to have labels where the task reads them."""

    def __init__(self, pl_module: pl.LightningModule, batches: Iterable[Batch]) -> None:
        self._needed = isinstance(pl_module, DrawsLabels)
        self._name = type(pl_module).__name__
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches.

        Raises:
            LabelsError: one has no labels.
        """
        for batch in self._batches:
            if self._needed and "labels" not in batch:
                raise LabelsError(self._name, "the calibration batches have no labels", "sampled")
            yield batch


class SampledLabels:
    """Batches with labels drawn from the module's own predictions, whose gradients give the true Fisher information.

    All labels are drawn at once, in a forward pass of their own for each batch: they are the same whenever the batches
    are gone through, whether samples then go through the model together or one by one. The draws depend on the seed
    and the rank of the process, not on the global random state.

    Args:
        pl_module: A task that `DrawsLabels`; runs in eval mode, and is left as it was.
        batches: Model inputs on the module's device, the same each time they are gone through.
        seed: Of the draws.
        rank: Of the process.

    Raises:
        LabelsError: the task cannot draw them.

    References:
        Kunstner, Hennig and Balles, Limitations of the empirical Fisher approximation for natural gradient descent,
        NeurIPS 2019 (how the two differ).
    """

    def __init__(self, pl_module: pl.LightningModule, batches: Iterable[Batch], seed: int, rank: int = 0) -> None:
        check_labels(pl_module, "sampled")
        self._batches = batches
        self._limit: int | None = None
        digest = hashlib.blake2b(f"labels {seed} {rank}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))

        def uniform(count: int) -> Tensor:
            return torch.rand(count, generator=generator, dtype=torch.float64)

        with frozen_eval(pl_module), torch.no_grad():
            self._labels = [self._drawn(pl_module, batch, uniform).cpu() for batch in batches]

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches with their drawn labels."""
        for batch, labels in zip(self._batches, self._labels, strict=True):
            yield {**batch, "labels": labels.to(next(iter(batch.values())).device)}

    def _drawn(self, pl_module: pl.LightningModule, batch: Batch, uniform: Uniform) -> Tensor:
        """Labels `[b, …]`; a batch that does not fit into memory is halved, and so are those after it."""
        assert isinstance(pl_module, DrawsLabels)
        size = batch_size(batch)
        if self._limit is None or size <= self._limit:
            try:
                outputs: Tensor = pl_module(batch).float()
                return pl_module.drawn_labels(outputs, batch, uniform)
            except Exception as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            release_memory()
            self._limit = (size + 1) // 2
        return torch.cat([self._drawn(pl_module, part, uniform) for part in split(batch, self._limit)])
