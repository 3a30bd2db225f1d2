"""Batches of any structure: tensors in mappings, tuples and lists, samples along the first dimension. b: samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lowrank_pl.errors.numerics import BatchShapeError

Batch: TypeAlias = Any
"""A tensor `[b, …]`, or mappings, tuples and lists of them, nested at will.

What has no dimension, and what is no tensor at all, belongs to every sample.
"""


def batch_size(batch: Batch) -> int:
    """Number of samples.

    Raises:
        BatchShapeError: there is no tensor, or tensors have different numbers of samples.
    """
    sizes = [len(tensor) for tensor in tensors_of(batch)]
    if not sizes:
        raise BatchShapeError(type(batch).__name__, "holds no tensor with a dimension")
    if len(set(sizes)) > 1:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors_of(batch))
        raise BatchShapeError(type(batch).__name__, f"holds tensors of shapes {shapes}")
    return sizes[0]


def tensors_of(batch: Batch) -> list[Tensor]:
    """The tensors that have samples, in a fixed order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(batch, note)
    return found


def rebuilt(batch: Batch, tensors: list[Tensor]) -> Batch:
    """A batch of the same structure with other tensors, in the order of `tensors_of`."""
    given = iter(tensors)
    return mapped(batch, lambda _: next(given))


def mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """A batch of the same structure, each tensor that has samples replaced by what `change` makes of it."""
    if isinstance(batch, Tensor):
        return change(batch) if batch.ndim else batch
    if isinstance(batch, Mapping):
        items = {key: mapped(item, change) for key, item in batch.items()}
        if not isinstance(batch, MutableMapping):
            return items
        made = copy.copy(batch)  # keeps what a loss may ask of the class, such as attributes of a BatchEncoding
        made.update(items)
        return made
    if isinstance(batch, (tuple, list)):
        parts = [mapped(item, change) for item in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """Batches of at most a size."""
    for start in range(0, batch_size(batch), size):
        yield mapped(batch, lambda tensor, start=start: tensor[start : start + size])  # type: ignore[misc]


def selected(batch: Batch, indices: Tensor) -> Batch:
    """The samples of given indices `[k]`, int64."""
    return mapped(batch, lambda tensor: tensor[indices.to(tensor.device)])


def first(batch: Batch, count: int) -> Batch:
    """The first samples, again from the start where there are too few."""
    return selected(batch, torch.arange(count) % batch_size(batch))
