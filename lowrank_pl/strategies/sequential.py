"""Static methods of which layers can be factorised one after the other, behind those that are factorised already."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lowrank_pl.allocation import Allocation, RankRequest
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.importance import Importance, ImportanceCache, LayerMoments, SecondMoments
from lowrank_pl.nn import is_embedding
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.strategies.block_by_block import BlockByBlock
from lowrank_pl.strategies.calibration import loss_identity
from lowrank_pl.strategies.decomposition import Factorised
from lowrank_pl.strategies.finished_blocks import FinishedBlocks
from lowrank_pl.strategies.layer_factoriser import LayerFactoriser, Record
from lowrank_pl.strategies.memory_bound import memory_bound
from lowrank_pl.strategies.processes import Agreement, gathered, send_, work_shared
from lowrank_pl.strategies.static import StaticStrategy

logger = logging.getLogger(__name__)


class SequentialStrategy(StaticStrategy):
    """Common part of the methods that measure second moments.

    Where the option is set, the dense model is measured first, group by group under `calibration.max_memory`; of each
    layer only its energies and, if the metric has that side, the moment of its output gradients are kept: on disk where
    there is a bound on memory or a folder for finished blocks. Then every layer gets its factors in the order of calls.

    A subclass calls `use_sequential` before `super().__init__`, and measures `SecondMoments`.
    """

    sequential: BlockByBlock | None = None

    def use_sequential(self, given: BlockByBlock | bool | None) -> None:
        """Takes the option as it may be written.

        Raises:
            RangeError: it is something else.
        """
        if not isinstance(given, (BlockByBlock, bool, type(None))):
            raise RangeError("sequential", given, "true, false or a BlockByBlock")
        self.sequential = BlockByBlock() if given is True else given or None

    def options(self) -> dict[str, Any]:
        """Adds the option, where it is set."""
        return super().options() | ({} if self.sequential is None else {"sequential": self.sequential.options()})

    @property
    def keeps_progress(self) -> bool:
        """Whether a stopped run can go on where it was: block by block."""
        return self.sequential is not None

    def told_beforehand(self, encoder: nn.Module, item: int, tokens: int | None) -> list[str]:
        """See `CompressionStrategy.told_beforehand`; of a sample whose length is not known, one token."""
        if self.sequential is None:
            return super().told_beforehand(encoder, item, tokens)
        layers = self.targets.select(encoder)
        plan, shapes, beforehand = self.plan(encoder), self.targets.shapes(layers), self.beforehand
        ranked = {name: rank for name, rank in plan.ranks.items() if rank is not None}
        groups = [] if beforehand is None else beforehand.groups(shapes, self.calibration.max_memory)
        samples = min(self.sequential.max_samples, self.calibration.max_samples or self.sequential.max_samples)
        width = min(shapes[name].in_features for name in shapes)
        width = getattr(getattr(encoder, "config", None), "hidden_size", width)
        models = 2 if self.sequential.needs_dense_passes else 1
        bound = memory_bound(
            shapes,
            {name: plan.parameters(name) for name in ranked},
            sum(parameter.numel() for parameter in encoder.parameters()),
            item,
            beforehand,
            groups,
            models * samples * (tokens or 1) * width,
            stays=self.refit is not None,
        )
        length = "one token; multiply by their length" if tokens is None else f"{tokens} tokens"
        return bound.lines(f"{samples} samples of {length}")

    @property
    def moments(self) -> SecondMoments:
        """What the method measures."""
        importance: Importance[Any] = self.importance
        assert isinstance(importance, SecondMoments)
        return importance

    @property
    def beforehand(self) -> SecondMoments | None:
        """What of it is measured of the dense model, before ranks are given; `None` for nothing."""
        kept = self.moments if self.allocation.needs_energies else SecondMoments("none", self.moments.outputs)
        return None if kept.inputs == kept.outputs == "none" else kept

    @property
    def measured_of_dense(self) -> Importance[Any] | None:
        """In the order of calls only what ranks and the metric of the outputs need."""
        return super().measured_of_dense if self.sequential is None else self.beforehand

    def check_compress(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also looks whether the blocks that are kept are those of this run.

        Raises:
            BlocksMismatchError: they are not.
        """
        super().check_compress(trainer, pl_module)
        if self.sequential is None:
            return
        finished = FinishedBlocks(self.progress_folder)
        with Agreement(trainer):
            if trainer.is_global_zero and finished.is_begun:
                encoder = as_compressible(pl_module).encoder
                run = LayerFactoriser(self, trainer, pl_module, self.candidates(encoder))
                # What a module of somebody else's has noted while it was scored counts as a setting of its loss.
                finished.check(self._identity(run, self.sequential), leaving_out=("loss",))

    def _factorise(self, run: LayerFactoriser, request: RankRequest) -> tuple[Allocation, dict[str, Record]]:
        if self.sequential is None:
            return super()._factorise(run, request)
        finished = FinishedBlocks(self.progress_folder, on_disk=self.calibration.max_memory is not None)
        in_order = _InOrder(self, self.sequential, run, finished)
        try:
            with Agreement(run.trainer):
                if run.trainer.is_global_zero:
                    finished.begin(self._identity(run, self.sequential))
            return in_order.run(request)
        finally:
            finished.close()

    def _identity(self, run: LayerFactoriser, sequential: BlockByBlock) -> dict[str, Any]:
        """What the factors depend on; looked at only where they are kept."""
        if self.progress_folder is None:
            return {}
        return {
            "model": ImportanceCache.key(run.encoder, list(run.layers), "", ""),
            "data": sequential.batches(run.trainer, self.calibration).fingerprint,
            "loss": loss_identity(run.trainer, run.pl_module),
            "processes": run.trainer.world_size,
            "method": type(self).__name__,
            **{key: value for key, value in self.options().items() if key not in ("refit", "recalibration")},
            "max_samples": self.calibration.max_samples,
        }


class _InOrder:
    """One run of a strategy: `Work` for its option, and what comes before.

    Args:
        strategy: The strategy.
        sequential: Its option.
        layers: What is targeted.
        finished: What was done before, and where more is kept.

    Attributes:
        dense: The dense layers of what has been exchanged, by name.
        owners: Which process decomposes which layer.
    """

    def __init__(
        self,
        strategy: SequentialStrategy,
        sequential: BlockByBlock,
        layers: LayerFactoriser,
        finished: FinishedBlocks,
    ) -> None:
        self._strategy = strategy
        self._sequential = sequential
        self._layers = layers
        self._trainer = layers.trainer
        self._finished = finished
        self.dense: dict[str, nn.Module] = {}
        self.owners = layers.owners
        self._ranks: dict[str, int] = {}

    def run(self, request: RankRequest) -> tuple[Allocation, dict[str, Record]]:
        """See `StaticStrategy._factorise`."""
        layers, calibration, pl_module = self._layers, self._strategy.calibration, self._layers.pl_module
        linears = [name for name, layer in layers.layers.items() if not is_embedding(layer)]
        order = self._sequential.order(self._trainer, pl_module, calibration, linears)
        allocation = self._strategy.allocation.allocate(request, self._energies())
        ranks = self._ranks = {name: rank for name, rank in allocation.ranks.items() if rank is not None}
        order = [stage for stage in (stage.among(ranks) for stage in order) if stage.layers]
        in_order = [name for stage in order for name in stage.layers]
        rest = [name for name in ranks if name not in in_order]
        told = self._loaded()
        if missing := [name for name in rest if name not in told]:
            decompositions = layers.decompose_all(missing)
            self.dense |= {name: layers.layers[name] for name in missing}
            told |= layers.exchange_({name: ranks[name] for name in missing}, decompositions)
            self.finish(missing, told)
        todo = [stage for stage in order if stage.layers[0] not in told]
        found, samples = self._sequential.fit_(self._trainer, pl_module, calibration, todo, self)
        note = f"{len(in_order)} layers were factorised in the order of their calls on {samples} samples"
        if rest:
            note += f"; {len(rest)} that are called several times, or never, before them"
        layers.notes["sequential"] = note
        told |= found
        if apart := [name for name, record in told.items() if record.pop("apart", False)]:
            layers.notes["apart"] = (
                f"layers that get other tokens than in the dense model: {len(apart)}, e.g. {apart[0]!r}"
            )
        layers.samples = layers.samples or samples
        return allocation, {name: told[name] for name in ranks}

    def _energies(self) -> dict[str, Tensor]:
        """Energies of all layers, measured now or by an earlier start; moments of outputs are kept on the way."""
        importance, layers = self._strategy.beforehand, self._layers
        if importance is None:
            return {}
        if (found := self._energies_of_before(importance)) is not None:
            return found
        energies: dict[str, Tensor] = {}
        shapes = self._strategy.targets.shapes(layers.layers)
        for names in importance.groups(shapes, self._strategy.calibration.max_memory):
            energies |= self._measured(names, importance)
        with Agreement(self._trainer):
            if self._trainer.is_global_zero:
                self._finished.save_measured(energies, {"notes": layers.notes, "samples": layers.samples})
        return energies

    def _energies_of_before(self, importance: SecondMoments) -> dict[str, Tensor] | None:
        """Those that an earlier start has kept, where all moments that are still needed are there as well."""
        kept = self._trainer.strategy.broadcast(self._finished.measured() if self._trainer.is_global_zero else None)
        if kept is None:
            return None
        if importance.outputs != "none":
            done = self._trainer.strategy.broadcast(list(self._finished.load()[0]))
            own = [n for n, owner in self.owners.items() if owner == self._trainer.global_rank and n not in done]
            if not all(gathered(self._trainer, all(map(self._finished.has_moment, own)))):
                return None
        energies, told = kept
        self._layers.notes, self._layers.samples = dict(told["notes"]), told["samples"]
        return dict(energies)

    def _measured(self, names: Sequence[str], importance: SecondMoments) -> dict[str, Tensor]:
        """The energies of a group of layers."""
        measured = self._layers.measure(names, importance).layers

        def look(name: str) -> tuple[Tensor | None, str | None]:
            moments, energies, note = measured.pop(name), None, None
            if self._strategy.allocation.needs_energies:
                decomposition, note = self._layers.decompose(name, moments)
                energies = decomposition.energies
            if moments.outputs is not None:
                self._finished.put_moment(name, moments.outputs)
            return None if energies is None else energies.cpu(), note

        told = work_shared(self._trainer, {name: self.owners[name] for name in names}, look, "Energies")
        self._layers.notes |= {name: note for name, (_, note) in told.items() if note is not None}
        return {name: energies for name, (energies, _) in told.items() if energies is not None}

    def _loaded(self) -> dict[str, Record]:
        """Puts the layers into the encoder that an earlier start has finished; returns their records."""
        with Agreement(self._trainer):
            states, told = self._finished.load() if self._trainer.is_global_zero else ({}, {})
        told = self._trainer.strategy.broadcast(told)
        for name in told:
            made = self._exchange(name)
            if self._trainer.is_global_zero:
                made.load_state_dict(states[name])
            for parameter in made.parameters():
                send_(self._trainer, parameter.data, 0)
        if told:
            logger.warning(
                "going on with the blocks that an earlier start has finished in %s: %d of %d layers",
                self._strategy.progress_folder,
                len(told),
                len(self._ranks),
            )
        return dict(told)

    def _exchange(self, name: str) -> nn.Module:
        """Puts empty factors in the place of a layer."""
        self.dense[name] = self._layers.layers[name]
        return self._layers.put_empty(name, self._ranks[name])

    # `Work`.

    def begin(self, names: Sequence[str]) -> None:
        """Exchanges the layers of the next block for empty factors."""
        for name in names:
            self._exchange(name)

    def decompose(self, name: str, weight: Tensor, moment: Tensor) -> Factorised:
        """As the method does, with the moment of outputs that was measured beforehand."""
        outputs = None if self._strategy.moments.outputs == "none" else self._finished.moment(name)
        outputs = None if outputs is None else outputs.to(weight.device)
        measured = LayerMoments(_as_measured(moment, self._strategy.moments), outputs)
        return self._strategy.decompose(weight, measured, self._layers.samples or 0).at(self._ranks[name])

    def finish(self, names: Sequence[str], told: Mapping[str, Record]) -> None:
        """Keeps the factors of layers that are done, and drops what is not needed any more."""
        with Agreement(self._trainer):
            if self._trainer.is_global_zero:
                states = {name: self._layers.encoder.get_submodule(name).state_dict() for name in names}
                self._finished.save(states, {name: dict(told[name]) for name in names})
        self._finished.drop_moments(names)

    def leave(self, names: Sequence[str]) -> None:
        """Takes dense layers off the device, where nothing else is to be fitted to them."""
        if self._strategy.refit is None:
            for name in names:
                self.dense[name].cpu()


def _as_measured(moment: Tensor, importance: SecondMoments) -> Tensor | None:
    """As much of the moment `[n, n]` of inputs as a method takes."""
    extent = importance.inputs
    if isinstance(extent, int):
        starts = range(0, len(moment), extent)
        return torch.stack([moment[start : start + extent, start : start + extent] for start in starts])
    return {"full": moment, "diagonal": moment.diagonal(), "none": None}[extent]
