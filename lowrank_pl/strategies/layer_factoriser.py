"""The layers of one run of a static method: measured, decomposed and exchanged, by all processes together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

import lightning.pytorch as pl
from torch import Tensor, nn

from lowrank_pl.core import relative_error
from lowrank_pl.core.elementwise.solver import DIVERGED
from lowrank_pl.importance import Importance, LayerImportance, Measured
from lowrank_pl.nn import LayerForm, LinearForm, LowRankLinear, dense_shape, dense_weight, restated, two_factors
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.strategies.calibration import Calibration, measure_importance
from lowrank_pl.strategies.decomposition import Decomposition, Factorised
from lowrank_pl.strategies.processes import assign, gathered, send_, work_shared
from lowrank_pl.surgery import TargetSelector, replace_module_

logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""The fields of a factorised layer's record that are known when its factors are written."""


class Method(Protocol):
    """What has to be known of a method."""

    calibration: Calibration
    targets: TargetSelector

    @property
    def importance(self) -> Importance[Any]:
        """What it measures."""

    def decompose(self, weight: Tensor, measured: LayerImportance | None, samples: int) -> Decomposition:
        """See `StaticStrategy.decompose`."""


class LayerFactoriser:
    """What is done to layers in one run of a method. Every process must call everything that takes several layers.

    Args:
        method: Whose run it is.
        trainer: Of the run.
        pl_module: With the encoder.
        layers: What is targeted, dense, by name.

    Attributes:
        trainer: As given.
        pl_module: As given.
        encoder: The module's.
        layers: As given.
        notes: What is to be told of the run, by layer or subject.
        samples: How many samples were measured on; `None` where nothing was.
        owners: Which process decomposes which layer, by what a decomposition costs up to a constant: `m n min(m, n)`.
    """

    def __init__(
        self, method: Method, trainer: pl.Trainer, pl_module: pl.LightningModule, layers: Mapping[str, nn.Module]
    ) -> None:
        self._method = method
        self.trainer = trainer
        self.pl_module = pl_module
        self.encoder = as_compressible(pl_module).encoder
        self.layers = layers
        self.notes: dict[str, str] = {}
        self.samples: int | None = None
        costs = {name: float(s.dense_params * s.full_rank) for name, s in method.targets.shapes(layers).items()}
        self.owners: Mapping[str, int] = assign(costs, trainer.world_size)

    def measure(self, names: Iterable[str], importance: Importance[Any]) -> Measured[Any]:
        """Measures some of the layers on the calibration batches."""
        group = {name: self.layers[name] for name in names}
        asked_by = type(self._method).__name__
        found = measure_importance(self.trainer, self.pl_module, group, importance, self._method.calibration, asked_by)
        self.samples = found.num_samples
        return found

    def decompose(self, name: str, measured: LayerImportance | None) -> tuple[Decomposition, str | None]:
        """Prepares one layer for any rank, on this process alone; a note where the method could not be used."""
        note = None
        if measured is not None:
            measured.check(name)
            if measured.is_zero:
                note = f"no loss depends on {name!r}: factorised by plain SVD instead"
                logger.warning(note)
        return self._method.decompose(dense_weight(self.layers[name]).detach(), measured, self.samples or 0), note

    def decompose_all(self, names: Iterable[str]) -> dict[str, Decomposition]:
        """Measures layers group by group, and decomposes those that are this process's; returns these."""
        importance, layers = self._method.importance, {name: self.layers[name] for name in names}
        needs_data = importance.needs_data and bool(layers)
        if needs_data and as_compressible(self.pl_module).freshly_initialised_head:
            logger.warning(
                "the head is freshly initialised: %s will weigh the weights for a task the model has not "
                "learned. Fine-tune first and pass the checkpoint as model.init_args.init_from.",
                type(self._method).__name__,
            )
        made: dict[str, Decomposition] = {}
        max_memory = self._method.calibration.max_memory if importance.needs_data else None
        for group in importance.groups(self._method.targets.shapes(layers), max_memory):
            measured: dict[str, LayerImportance] = self.measure(group, importance).layers if needs_data else {}

            def decompose(name: str, measured: dict[str, LayerImportance] = measured) -> str | None:
                made[name], note = self.decompose(name, measured.pop(name, None))
                return note

            told = work_shared(self.trainer, {name: self.owners[name] for name in group}, decompose, "Decomposition")
            self.notes |= {name: note for name, note in told.items() if note is not None}
        return made

    def energies(self, decompositions: Mapping[str, Decomposition]) -> dict[str, Tensor]:
        """Those of all processes' layers, on the CPU."""
        own = {name: d.energies.cpu() for name, d in decompositions.items() if d.energies is not None}
        return {name: energy for share in gathered(self.trainer, own) for name, energy in share.items()}

    def put_empty(self, name: str, rank: int) -> LayerForm:
        """Puts the form in two factors, zeros, in the place of a dense layer, on this process; returns it."""
        layer = self.layers[name]
        made = two_factors(dense_shape(layer)).empty({"rank": rank}, layer)
        replace_module_(self.encoder, name, made)
        return made

    def exchange_(self, ranks: Mapping[str, int], decompositions: dict[str, Decomposition]) -> dict[str, Record]:
        """Puts factorised layers into the encoder, one at a time; returns a record of each."""
        owners = {name: owner for name, owner in self.owners.items() if name in ranks}

        def write(name: str) -> tuple[Record, str | None]:
            found = decompositions.pop(name).at(ranks[name])
            return write_factors(name, self.layers[name], self.put_empty(name, ranks[name]), found)

        written = work_shared(self.trainer, owners, write, "Factorisation")
        for name, owner in owners.items():
            if owner != self.trainer.global_rank:
                self.put_empty(name, ranks[name])
            for parameter in self.encoder.get_submodule(name).parameters():
                send_(self.trainer, parameter.data, owner)
        self.notes |= {f"{name} solver": note for name, (_, note) in written.items() if note is not None}
        return {name: told for name, (told, _) in written.items()}

    def restate_(self, form: type[LinearForm], names: Iterable[str]) -> None:
        """Brings layers in two factors to another form of the same functions."""
        owners = {name: self.owners[name] for name in names}

        def restate(name: str) -> None:
            replace_module_(self.encoder, name, restated(self.encoder.get_submodule(name), form))

        work_shared(self.trainer, owners, restate, "Pivot rows")
        for name, owner in owners.items():
            layer = cast(LowRankLinear, self.encoder.get_submodule(name))
            if owner != self.trainer.global_rank:
                replace_module_(self.encoder, name, form.empty(layer.spec(), layer))
            for tensor in self.encoder.get_submodule(name).state_dict().values():
                send_(self.trainer, tensor, owner)


def write_factors(name: str, layer: nn.Module, made: LayerForm, found: Factorised) -> tuple[Record, str | None]:
    """Writes factors into an empty layer; returns the fields of its record, and a note."""
    made.assign_(found.factors)
    record = {
        "error": relative_error(dense_weight(layer).detach(), found.factors.product()),
        "weighted_error": found.weighted_error,
        "losses": found.losses,
        "outcome": found.outcome,
    }
    if found.outcome is not None and found.outcome.startswith(DIVERGED):
        return record, f"the solver of {name!r} {found.outcome}: the best of its iterates is used"
    return record, None
