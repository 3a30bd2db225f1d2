"""Forward and backward passes over batches: the fastest way that is exact for the model at hand. b: samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor, nn

from lowrank_pl.errors.numerics import LossShapeError, NonFiniteError
from lowrank_pl.importance.batches import Batch as Batch
from lowrank_pl.importance.batches import batch_size as batch_size
from lowrank_pl.importance.batches import first
from lowrank_pl.importance.batches import split as split
from lowrank_pl.importance.finite import first_not_finite
from lowrank_pl.importance.memory import is_out_of_memory, release_memory
from lowrank_pl.importance.tape import LinearTape, SampleMixingError
from lowrank_pl.importance.vectorise import vectorised

logger = logging.getLogger(__name__)

PerSampleLoss = Callable[[Batch], Tensor]
_LARGEST_SCALE, _BACK_OFF = 2**15, 2**3
"""Of the loss where weights are float16, of which 2¹⁵ is the largest power of two."""
Reduce = Callable[[Tensor], Tensor]


class AddsTokens(Protocol):
    """Adds up what one layer's tape hands out."""

    def add(self, x: Tensor, g: Tensor) -> None:
        """Adds the samples of `x [b, t, n]` and `g [b, t, m]`."""
        ...


class Way(Enum):
    """How the samples of a batch go through the model, from the fastest to the slowest."""

    TOGETHER = "as one batch: every layer's input has a dimension that is the batch"
    VECTORISED = "each as a batch of one, all in one vectorised pass: a layer sees what samples share"
    SINGLY = "one after the other: the model branches on values, or memory is too short for more"


class Passes:
    """Adds batch by batch to accumulators; a context manager, whose block holds the hooks in the layers.

    A batch that does not fit into memory is halved until it does, and so are the batches after it. A layer
    whose gradients had been added when memory ran out is not added again.

    In float16 the small gradients of a model that is sure of itself would become zero: of layers with such weights the
    loss is multiplied by a power of two, which is lowered where gradients overflow, and gradients are divided by it.

    Args:
        layers: The layers to measure, by name.
        loss: Maps a batch to the losses `[b]` of its samples, each as if it were alone.
        accumulators: Where each layer's gradients go.
        expected: How many samples there will be, for what is told of the time, or `None`.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        loss: PerSampleLoss,
        accumulators: Mapping[str, AddsTokens],
        expected: int | None = None,
    ) -> None:
        self._layers = layers
        self._given_loss = loss
        self._accumulators = accumulators
        self._expected = expected
        self._way: Way | None = None
        self._limit: int | None = None
        self._done: set[str] = set()
        self._untold = False
        self._told_unreached = False
        half = any(layer.get_parameter("weight").dtype is torch.float16 for layer in layers.values())
        self._scale = _LARGEST_SCALE if half else 1
        self._overflowed = False
        self._tape = LinearTape(layers, self._consume)

    def __enter__(self) -> Passes:
        self._tape.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._tape.__exit__(None, None, None)
        self._accumulators = {}  # the tape knows this object: both would keep the sums until garbage is collected

    def add(self, batch: Batch) -> int:
        """Adds one batch; returns its number of samples.

        Raises:
            BatchShapeError, LossShapeError: the batch's tensors, or its losses, are not one per sample.
            NonFiniteError: a loss is NaN or Inf.
            torch.OutOfMemoryError, RuntimeError: memory is too short for a single sample.
        """
        size = batch_size(batch)
        if size:
            if self._way is None:
                self._way = self._first_way(batch)
            self._add(batch, frozenset())
        return size

    def _add(self, batch: Batch, done: frozenset[str]) -> None:
        """Adds a batch to all layers but those for which it is done."""
        size = batch_size(batch)
        limit = 1 if self._way is Way.SINGLY else self._limit
        if limit is not None and size > limit:
            for part in split(batch, limit):
                self._add(part, done)
            return
        self._done = set(done)
        failure = self._pass(batch)
        if failure is None:
            return
        # Only now, because the traceback of an error that is being handled keeps its tensors alive.
        self._tape.start(0)
        release_memory()
        if failure is _Failure.MEMORY:
            self._halve(size)
        elif failure is _Failure.OVERFLOW:
            self._scale = max(1, self._scale // _BACK_OFF)
        elif failure is _Failure.MIXING:
            self._way = self._slower_way(batch)
        else:
            self._way = self._singly("it cannot be vectorised")
        self._add(batch, frozenset(self._done))

    def _pass(self, batch: Batch) -> _Failure | None:
        """One forward and backward pass; says what to do something about, and raises what nothing can be done about."""
        began = time.perf_counter()
        self._overflowed = False
        try:
            with torch.enable_grad():
                losses = self._losses(batch)
                if not bool(torch.isfinite(losses.detach()).all()):
                    count = int((~torch.isfinite(losses)).sum())
                    raise NonFiniteError("the loss of a calibration batch", count, first=self._first_seen(batch))
                total = losses.sum() if self._scale == 1 else (losses.float() * self._scale).sum()
                if total.requires_grad:
                    total.backward()
                else:
                    self._tell_unreached()
            self._tape.finish()
        except SampleMixingError:
            return _Failure.MIXING
        except NonFiniteError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                if batch_size(batch) == 1:
                    raise
                return _Failure.MEMORY
            if self._way is Way.VECTORISED:
                return _Failure.VECTORISING
            raise
        if self._overflowed:
            return _Failure.OVERFLOW
        if self._untold:
            self._untold = False
            self._tell_time(time.perf_counter() - began)
        return None

    def _tell_unreached(self) -> None:
        """Warns once that the loss depends on none of several layers; of one that nothing uses others speak."""
        if len(self._layers) > 1 and not self._told_unreached:
            self._told_unreached = True
            logger.warning(
                "the loss depends on none of %d layers, e.g. %r: if it should, look for detach() or no_grad() in what "
                "computes it",
                len(self._layers),
                next(iter(self._layers)),
            )

    def _loss(self, batch: Batch) -> Tensor:
        """Losses `[b]`: a mean over samples would pass for a loss, and give another quantity."""
        losses = self._given_loss(batch)
        size = batch_size(batch)
        if not isinstance(losses, Tensor) or tuple(losses.shape) != (size,):
            raise LossShapeError(losses.shape if isinstance(losses, Tensor) else type(losses).__name__, size)
        return losses

    def _first_seen(self, batch: Batch) -> str:
        """Where in a batch's forward pass NaN or Inf first come up. Ends the recording."""
        self._tape.__exit__(None, None, None)
        seen = first_not_finite(self._layers, lambda: self._loss(batch), inputs=True)
        return seen or "what follows the layers to factorise"

    def _losses(self, batch: Batch) -> Tensor:
        size = batch_size(batch)
        if self._way is Way.VECTORISED:
            return vectorised(self._loss, batch, lambda marker: self._tape.start(size, marker))
        self._tape.start(size)
        return self._loss(batch)

    def _consume(self, name: str, x: Tensor, g: Tensor) -> None:
        if name in self._done:
            return
        if self._scale > 1:
            if not bool(torch.isfinite(g).all()):
                self._overflowed = True
                return
            g = g.float() / self._scale
        self._accumulators[name].add(x, g)
        self._done.add(name)

    def _first_way(self, batch: Batch) -> Way:
        """Finds out on copies of a batch's first samples, before anything is added."""
        failed = None
        try:
            with torch.enable_grad():
                if self._tape.rehearse(lambda size: self._loss(first(batch, size))):
                    return Way.TOGETHER
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = "memory is too short for three"
        if failed is not None:
            release_memory()
            return self._singly(failed)
        return self._slower_way(batch)

    def _slower_way(self, batch: Batch) -> Way:
        """The vectorised way if it works for the model and gives its losses, on copies of a batch's first samples."""
        two = first(batch, 2)
        try:
            with torch.enable_grad():
                given = vectorised(self._loss, two, lambda marker: self._tape.start(2, marker))
                expected = torch.cat([self._alone(sample) for sample in split(two, 1)])
        except Exception as error:
            return self._singly(f"it cannot be vectorised ({_first_line(error)})")
        # A loss that is NaN is for the pass itself to refuse.
        if not torch.allclose(given.float(), expected.float(), rtol=1e-2, atol=1e-3, equal_nan=True):
            return self._singly("vectorising changes its losses")
        logger.info("samples share tensors inside the model: measuring in vectorised passes")
        return Way.VECTORISED

    def _alone(self, sample: Batch) -> Tensor:
        self._tape.start(1)
        return self._loss(sample)

    def _singly(self, reason: str) -> Way:
        count = "" if self._expected is None else f", {self._expected} in this process"
        logger.warning(
            "the Fisher information is measured with a forward and a backward pass per sample%s: samples cannot go "
            "through the model together, and %s",
            count,
            reason,
        )
        self._untold = self._expected is not None
        return Way.SINGLY

    def _tell_time(self, seconds: float) -> None:
        assert self._expected is not None
        total = seconds * self._expected
        logger.warning(
            "the first sample took %.2g s: about %.0f s for all; calibration.max_samples lowers it", seconds, total
        )

    def _halve(self, size: int) -> None:
        self._limit = (size + 1) // 2
        logger.warning("out of memory with %d samples in a calibration batch: going on with %d", size, self._limit)


class _Failure(Enum):
    MIXING = "samples share a tensor"
    MEMORY = "memory is too short"
    VECTORISING = "an operation cannot be vectorised"
    OVERFLOW = "gradients are too large for float16"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]
