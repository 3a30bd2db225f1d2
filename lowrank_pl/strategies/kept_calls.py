"""Passes of a factorised model and of the dense one beside it, block by block, as little of them as layers need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lowrank_pl.errors.numerics import NonFiniteError
from lowrank_pl.importance.batches import Batch
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.strategies.calibration import Calibration
from lowrank_pl.strategies.labels import ObservedLabels
from lowrank_pl.strategies.links import Link, links
from lowrank_pl.strategies.padding import attention_mask
from lowrank_pl.strategies.processes import Agreement
from lowrank_pl.strategies.replay import Call, Stage, again, call_of, neighbours, stages
from lowrank_pl.surgery import Exchange

Pass = Callable[[], object]
T = TypeVar("T")


@dataclass
class _Kept:
    """What the block at hand is called with on one batch, in each of the models, and the batch's attention mask."""

    mask: Tensor | None
    calls: list[Call]


class KeptCalls:
    """Passes of the factorised model for every batch, and of the dense one before it where that counts.

    What a block is called with is kept while its layers are fitted, which changes nothing of what is before it; so each
    layer takes two passes through its block, not through the model. When the layers of a block are fitted, the kept
    calls go through it, and what it puts out is what the next block is called with, where one pass of each model has
    shown that on this very batch. Elsewhere the batch goes through the models again, as far as the next block.

    Args:
        trainer: Of the run.
        encoder: With the factorised layers; more may be put in before a block is looked at.
        dense: The layers that they stand for, by name, looked at anew every time.
        model: Runs the encoder on a batch.
        order: The layers that are fitted, in the order of their calls.
        both: Whether there are passes of the dense model at all.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        encoder: nn.Module,
        dense: Mapping[str, nn.Module],
        model: Callable[[Batch], object],
        order: Sequence[Stage],
        both: bool = True,
    ) -> None:
        self._trainer = trainer
        self._encoder = encoder
        self._layers = dense
        self._dense = Exchange(encoder, dense)
        self._model = model
        self._order = order
        self._both = both
        self._block = ""
        self._kept: list[_Kept] | None = None
        self._links: list[list[dict[str, Link]]] | None = None

    def of(self, block: str, batches: Iterable[Batch]) -> Iterator[tuple[Tensor | None, list[Pass]]]:
        """The attention mask of every batch, with a pass of the dense model, if both count, and of the factorised one.

        They must have run before the next batch is asked for.
        """
        self._dense = Exchange(self._encoder, self._layers)
        if block and block != self._block:
            self._go_to(block, batches)
        if not block or self._kept is None:
            for batch in map(self._moved, batches):
                yield self._mask(batch), self._passes([partial(self._model, batch)] * self._count)
            return
        module = self._encoder.get_submodule(block)
        for kept in self._kept:
            yield kept.mask, self._passes([partial(again, module, call) for call in kept.calls])

    @property
    def needs_whole_passes(self) -> bool:
        """Whether layers that are still to come cannot be reached from the block at hand."""
        blocks = list(dict.fromkeys(stage.block for stage in self._order))
        rest = blocks[blocks.index(self._block) :] if self._block in blocks else blocks
        if len(rest) == 1 and self._kept is not None:
            return False
        if self._links is None or self._kept is None or "" in rest:
            return True
        pairs = list(pairwise(rest))
        return any(_way(links, *pair) is None for models in self._links for links in models for pair in pairs)

    def _go_to(self, block: str, batches: Iterable[Batch]) -> None:
        """Keeps what a block is called with, of the block before while it lasts."""
        before, self._block = self._block, block
        if self._kept is not None and before and self._advance(before, block, batches):
            return
        self._kept = None
        self._kept = self._keep(self._encoder.get_submodule(block), batches)

    def _keep(self, module: nn.Module, batches: Iterable[Batch]) -> list[_Kept] | None:
        """From passes of the models as far as the block."""
        kept = []
        for batch in map(self._moved, batches):
            calls = [call_of(module, run) for run in self._passes([partial(self._model, batch)] * self._count)]
            known = [call for call in calls if call is not None]
            if len(known) < len(calls):
                return None
            kept.append(_Kept(self._mask(batch), known))
        return kept

    def _mask(self, batch: Batch) -> Tensor | None:
        return attention_mask(self._encoder, partial(self._model, batch), batch)

    def _advance(self, before: str, block: str, batches: Iterable[Batch]) -> bool:
        """From what the kept calls of a block before it put out; `False` where one batch does not show the way."""
        assert self._kept is not None
        if self._links is None:
            self._links = self._found_links(batches)
        if len(self._links) != len(self._kept):
            return False
        ways = [[_way(of_model, before, block) for of_model in models] for models in self._links]
        if any(way is None for models in ways for way in models):
            return False
        with torch.no_grad():
            for kept, of_batch in zip(self._kept, ways, strict=True):
                on = [
                    partial(self._through, before, call, way or [])
                    for call, way in zip(kept.calls, of_batch, strict=True)
                ]
                kept.calls = [run() for run in self._passes(on)]
        for models in self._links:  # masks and the like of blocks that are done
            for of_model in models:
                of_model.pop(block, None)
        return True

    def _through(self, block: str, call: Call, way: Sequence[tuple[str, Link]]) -> Call:
        """The call at the end of a way that begins with a call of a block."""
        for name, link in way:
            call = link.after(again(self._encoder.get_submodule(block), call))
            block = name
        return call

    def _found_links(self, batches: Iterable[Batch]) -> list[list[dict[str, Link]]]:
        """How blocks follow each other on every batch, in each of the models."""
        blocks = list(dict.fromkeys(stage.block for stage in self._order if stage.block))
        blocks = neighbours(self._encoder, blocks)
        names = [name for stage in self._order for name in stage.layers]
        forms = [self._encoder.get_submodule(name) for name in names]
        dense = [self._layers.get(name, form) for name, form in zip(names, forms, strict=True)]
        layers = [dense, forms][-self._count :]
        found = []
        for batch in map(self._moved, batches):
            runs = self._passes([partial(self._model, batch)] * self._count)
            found.append([links(run, self._encoder, blocks, of) for run, of in zip(runs, layers, strict=True)])
        return found

    @property
    def _count(self) -> int:
        return 2 if self._both else 1

    def _passes(self, runs: Sequence[Callable[[], T]]) -> list[Callable[[], T]]:
        """Of the models, the factorised one last: where both count, the first is run with the dense layers."""
        return [self._as_dense(runs[0]), *runs[1:]] if self._both else list(runs)

    def _as_dense(self, run: Callable[[], T]) -> Callable[[], T]:
        def run_dense() -> T:
            with self._dense:
                return run()

        return run_dense

    def _moved(self, batch: Batch) -> Batch:
        moved: Batch = self._trainer.strategy.batch_to_device(batch, self._trainer.strategy.root_device)
        return moved


def _way(links: Mapping[str, Link], start: str, end: str) -> list[tuple[str, Link]] | None:
    """The links from one block to another, through what is between them."""
    way: list[tuple[str, Link]] = []
    while end != start:
        if end not in links or len(way) > len(links):
            return None
        way.append((end, links[end]))
        end = links[end].before
    return way[::-1]


def order_of_calls(
    trainer: pl.Trainer,
    encoder: nn.Module,
    model: Callable[[Batch], object],
    batches: Iterable[Batch],
    layers: Sequence[str],
) -> list[Stage]:
    """Layers in the order of their calls, on the first process's first batch; the same on every process.

    Args:
        trainer: Of the run.
        encoder: With the layers.
        model: Runs the encoder on a batch.
        batches: Of which the first is looked at.
        layers: Their names.
    """
    found: list[Stage] = []
    with Agreement(trainer):
        if trainer.is_global_zero:
            first = trainer.strategy.batch_to_device(next(iter(batches)), trainer.strategy.root_device)
            found = stages(lambda: model(first), encoder, layers)
    return trainer.strategy.broadcast(found)


def check_activations(layer: str, block: str, *sums: Tensor | None) -> None:
    """Raises an error for sums over what a layer gets, the same on every process, that are not finite.

    Raises:
        NonFiniteError: it names block and layer.
    """
    for tensor in sums:
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            where = f"an activation in block {block!r}" if block else "an activation"
            raise NonFiniteError(f"{where}, which goes into a layer,", layer=layer)


def model_of(pl_module: pl.LightningModule, calibration: Calibration, asked_by: str) -> Callable[[Batch], object]:
    """What runs the model on a batch. Modules of others need not have a `forward` that takes one."""
    if calibration.labels == "sampled":
        return pl_module  # as drawing labels does, of which there may be none for a loss
    module = as_compressible(pl_module, asked_by, "per_sample_losses")

    def run(batch: Batch) -> object:
        (checked,) = ObservedLabels(pl_module, [batch])
        return module.per_sample_losses(checked)

    return run


@contextmanager
def without_cache(encoder: nn.Module) -> Iterator[None]:
    """Without decoders' caches, which another call of a block would change."""
    config: Any = getattr(encoder, "config", None)
    cached = getattr(config, "use_cache", None)
    try:
        if cached:
            config.use_cache = False
        yield
    finally:
        if cached:
            config.use_cache = cached
