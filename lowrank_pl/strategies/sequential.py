"""Static methods of which layers can be factorised one after the other, behind those that are factorised already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lowrank_pl.allocation import Allocation, RankRequest
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.importance import Importance, LayerMoments, SecondMoments
from lowrank_pl.nn import is_embedding
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.strategies.block_by_block import BlockByBlock
from lowrank_pl.strategies.calibration import measure_importance
from lowrank_pl.strategies.decomposition import Factorised
from lowrank_pl.strategies.processes import work_shared
from lowrank_pl.strategies.static import StaticStrategy
from lowrank_pl.strategies.writing import empty_factors
from lowrank_pl.surgery import replace_module_


@dataclass
class Known:
    """What is known of the dense model's layers before the first is factorised.

    Attributes:
        energies: By layer; empty where ranks do not depend on them.
        moments: Second moments of output gradients of this process's layers, where the metric has any.
        notes: For the report.
        samples: Measured on; `None` where nothing was.
    """

    energies: dict[str, Tensor]
    moments: dict[str, Tensor]
    notes: dict[str, str]
    samples: int | None = None


class SequentialStrategy(StaticStrategy):
    """Common part of the methods that measure second moments.

    A subclass sets `sequential` before it calls `super().__init__`, and measures `SecondMoments`.
    """

    sequential: BlockByBlock | None = None

    @staticmethod
    def read_sequential(given: BlockByBlock | bool | None) -> BlockByBlock | None:
        """The option as it may be written.

        Raises:
            RangeError: it is something else.
        """
        if not isinstance(given, (BlockByBlock, bool, type(None))):
            raise RangeError("sequential", given, "true, false or a BlockByBlock")
        return BlockByBlock() if given is True else given or None

    def _factorise(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, layers: Mapping[str, nn.Module], request: RankRequest
    ) -> tuple[Allocation, dict[str, dict[str, Any]], dict[str, str], int | None]:
        if self.sequential is None:
            return super()._factorise(trainer, pl_module, layers, request)
        encoder = as_compressible(pl_module).encoder
        exchanged: dict[str, nn.Module] = {}
        try:
            return self._factorise_in_order(self.sequential, trainer, pl_module, layers, request, exchanged)
        except BaseException:
            for name, layer in exchanged.items():
                replace_module_(encoder, name, layer)
            raise

    def _factorise_in_order(
        self,
        sequential: BlockByBlock,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: Mapping[str, nn.Module],
        request: RankRequest,
        exchanged: dict[str, nn.Module],
    ) -> tuple[Allocation, dict[str, dict[str, Any]], dict[str, str], int | None]:
        encoder = as_compressible(pl_module).encoder
        linears = [name for name, layer in layers.items() if not is_embedding(layer)]
        order = sequential.order(trainer, pl_module, self.calibration, linears)
        known = self._known(trainer, pl_module, layers)
        allocation = self.allocation.allocate(request, known.energies)
        ranks = {name: rank for name, rank in allocation.ranks.items() if rank is not None}
        order = [stage.among(ranks) for stage in order if any(name in ranks for name in stage.layers)]
        in_order = [name for stage in order for name in stage.layers]
        rest = {name: layers[name] for name in ranks if name not in in_order}
        decompositions, notes, samples = (
            self._decompose_all(trainer, pl_module, rest) if rest else ({}, {}, known.samples)
        )
        exchanged |= {name: layers[name] for name in ranks}
        told = self._exchange(trainer, encoder, rest, allocation, decompositions, notes)
        for name in in_order:
            replace_module_(encoder, name, empty_factors(layers[name], ranks[name]))

        def decompose(name: str, weight: Tensor, moment: Tensor) -> Factorised:
            measured = LayerMoments(self._inputs(moment), known.moments.pop(name, None))
            return self.decompose(weight, measured, known.samples or 0).at(ranks[name])

        owners = self._owners(trainer, layers)
        found, note = sequential.fit_(trainer, pl_module, self.calibration, exchanged, order, owners, decompose)
        told |= found
        if len(in_order) < len(ranks):
            note += f"; {len(ranks) - len(in_order)} beforehand"
        return allocation, {name: told[name] for name in ranks}, known.notes | notes | {"sequential": note}, samples

    @property
    def moments(self) -> SecondMoments:
        """What the method measures."""
        importance: Importance[Any] = self.importance
        assert isinstance(importance, SecondMoments)
        return importance

    def _inputs(self, moment: Tensor) -> Tensor | None:
        """As much of the moment of inputs as the method takes."""
        extent = self.moments.inputs
        if isinstance(extent, int):
            blocks = moment.view(len(moment) // extent, extent, len(moment) // extent, extent)
            return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return {"full": moment, "diagonal": moment.diagonal(), "none": None}[extent]

    def _known(self, trainer: pl.Trainer, pl_module: pl.LightningModule, layers: Mapping[str, nn.Module]) -> Known:
        """Measures the dense model's layers group by group; keeps energies and moments of outputs, and nothing else."""
        known = Known({}, {}, {})
        importance = self.moments if self.allocation.needs_energies else SecondMoments("none", self.moments.outputs)
        if importance.inputs == importance.outputs == "none":
            return known
        owners = self._owners(trainer, layers)
        for names in importance.groups(self.targets.shapes(layers), self.calibration.max_memory):
            group = {name: layers[name] for name in names}
            found = measure_importance(trainer, pl_module, group, importance, self.calibration, type(self).__name__)
            measured, known.samples = found.layers, found.num_samples

            def look(
                name: str, measured: dict[str, LayerMoments] = measured, samples: int = found.num_samples
            ) -> tuple[Tensor | None, str | None]:
                moments, note = measured.pop(name), None
                if self.allocation.needs_energies:
                    decomposition, note = self._decompose_one(name, layers[name], moments, samples)
                    energies = decomposition.energies
                if moments.outputs is not None:
                    known.moments[name] = moments.outputs
                return (energies.cpu() if self.allocation.needs_energies and energies is not None else None), note

            told = work_shared(trainer, {name: owners[name] for name in names}, look, "Energies")
            known.energies |= {name: energies for name, (energies, _) in told.items() if energies is not None}
            known.notes |= {name: note for name, (_, note) in told.items() if note is not None}
        return known
