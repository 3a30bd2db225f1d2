"""Single samples in one vectorised pass, for models in which samples share tensors. b: samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_pl.importance.batches import Batch, rebuilt, tensors_of

Record = Callable[[Tensor, Tensor], Tensor]


def vectorised(loss: Callable[[Batch], Tensor], batch: Batch, start: Any) -> Tensor:
    """The losses `[b]` of a batch as if each sample went through the model alone, in one pass.

    The model sees batches of one; `torch.vmap` carries out its operations for all samples together. What samples share
    in a batch, such as projected relative positions, thereby has a gradient per sample.

    Args:
        loss: Maps a batch to losses, one per sample.
        batch: Model inputs, first dimension samples.
        start: Called with a tensor that `tap` needs, when the pass begins.

    Raises:
        RuntimeError: the model does something that cannot be vectorised, such as branching on values.
    """

    def one(sample: list[Tensor], marker: Tensor) -> Tensor:
        start(marker)
        return loss(rebuilt(batch, [value.unsqueeze(0) for value in sample])).squeeze(0)

    tensors = tensors_of(batch)
    marker = torch.zeros(len(tensors[0]), device=tensors[0].device)
    with warnings.catch_warnings():
        # An operation without a rule of its own is carried out sample by sample: slower, and as right.
        warnings.filterwarnings("ignore", message=".*performance drop because we have not yet implemented.*")
        losses: Tensor = torch.vmap(one)(tensors, marker)
    return losses


def tap(x: Tensor, output: Tensor, marker: Tensor, record: Record) -> Tensor:
    """Hands a layer's input and output for all samples to `record`, from within `vectorised`.

    Args:
        x: Input of one sample, of any shape.
        output: Output of one sample, of any shape.
        marker: What `vectorised` has handed out.
        record: Called with both as `[b, …]`; what it returns, `[b, …]`, replaces the output.
    """
    result: Tensor = _Tap.apply(x, output, marker, record)  # type: ignore[no-untyped-call]
    return result


class _Tap(torch.autograd.Function):
    """The place where the tensors behind a vectorised one can be seen: a function's own rule for `vmap`."""

    @staticmethod
    def forward(x: Tensor, output: Tensor, marker: Tensor, record: Record) -> Tensor:
        """Never called: the marker is vectorised, whatever the others are."""
        del x, output, marker, record
        raise AssertionError("tap outside vectorised")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to save."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        """Sees all samples at once."""
        x, output, _, record = args
        size = info.batch_size
        return record(_first(x, in_dims[0], size), _first(output, in_dims[1], size)), 0


def _first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """`[b, …]`; a tensor that the samples share is given to each."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
