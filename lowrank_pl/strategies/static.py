"""Measure, allocate, factorise once; then tune on."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as pl
from torch import Tensor, nn

from lowrank_pl.allocation import Allocation, Allocator, LayerOverride, Measure, Parameters, RankRequest, Uniform
from lowrank_pl.allocation.uniform import check_share
from lowrank_pl.core.checks import check_finite
from lowrank_pl.errors.model import HeadError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import AllocationError, EmbeddingsError, ResumeMismatchError
from lowrank_pl.importance import Importance, LayerImportance, Nothing
from lowrank_pl.nn import (
    FinalForm,
    LowRankLinear,
    dense_weight,
    final_form,
    form_for,
    is_embedding,
    restated,
)
from lowrank_pl.strategies.base import CompressionStrategy, as_compressible
from lowrank_pl.strategies.calibration import Calibration, measure_importance
from lowrank_pl.strategies.decomposition import Decomposition
from lowrank_pl.strategies.processes import assign, gathered, send_, work_shared
from lowrank_pl.strategies.recalibration import Recalibration
from lowrank_pl.strategies.refit import Refit, refitted_errors
from lowrank_pl.strategies.writing import empty_factors, write_factors
from lowrank_pl.surgery import (
    CompressionRecord,
    CostRecord,
    LayerRecord,
    TargetSelector,
    conform_,
    heads_tied_to,
    replace_module_,
    tie_head_,
    untie_head_,
)

logger = logging.getLogger(__name__)


class StaticStrategy(CompressionStrategy):
    """Common part of the methods that factorise each layer once.

    What the method needs to know of the layers is measured on calibration batches, ranks are allocated, the layers are
    factorised one by one and exchanged. In `fit` that happens before the optimizer exists, and training goes on from
    there; in `compress` without a training step.

    Args:
        keep_ratio: Share of what the targeted layers cost to keep, `0 < keep_ratio <= 1`.
        rank_ratio: Instead of keep_ratio, the papers' measure: rank `int(rank_ratio * min(out, in))`.
        multiple_of: Round ranks to multiples, all layers together within keep_ratio.
        overrides: Exceptions for layers by name.
        targets: Which layers to factorise.
        calibration: How importance is measured; unused by methods that need none.
        cost: What keep_ratio is a share of: `Parameters`, `Flops`, or `Latency` with a table of times.
        allocation: Which layer gets which rank: `Uniform`, or `Global` for methods that know what a group is worth to
            the loss.
        recalibration: Fit one scale and one bias per output of the head, so that the outputs on the calibration samples
            are close to the dense model's; none by default.
        refit: Fit left factors and biases anew to the outputs of the dense layers, on inputs as the factorised model
            gives them: `true` for `Refit()`, or one with other settings. Only KroneckerSVD does unless it is asked for.
        form: In what layers end: `low_rank`, two factors, or `pivoted`, the same functions with `r (m + n − r)` instead
            of `r (m + n)` parameters, so higher ranks within the same keep_ratio.
    """

    def __init__(
        self,
        keep_ratio: float | None = None,
        rank_ratio: float | None = None,
        multiple_of: int = 1,
        overrides: list[LayerOverride] | None = None,
        targets: TargetSelector | None = None,
        calibration: Calibration | None = None,
        cost: Measure | None = None,
        allocation: Allocator | None = None,
        recalibration: Recalibration | None = None,
        refit: Refit | bool | None = False,
        form: FinalForm = "low_rank",
    ) -> None:
        super().__init__(targets)
        check_share(keep_ratio, rank_ratio, multiple_of)
        self.keep_ratio = keep_ratio
        self.rank_ratio = rank_ratio
        self.multiple_of = multiple_of
        self.overrides: Sequence[LayerOverride] = overrides or []
        self.calibration = calibration or Calibration()
        self.form = form
        self.cost = (cost or Parameters()).in_form(final_form(form))
        self.allocation = allocation or Uniform()
        self.recalibration = recalibration
        if not isinstance(refit, (Refit, bool, type(None))):
            raise RangeError("refit", refit, "true, false or a Refit")
        self.refit = Refit() if refit is True else refit or None
        if self.allocation.needs_energies and (reason := self.why_no_energies()):
            raise AllocationError(type(self.allocation).__name__, type(self).__name__, reason)
        if self.targets.embeddings and not self.cost.counts_lookups:
            unit = type(self.cost).__name__
            reason = f"in the unit of {unit} a dense look-up costs nothing, and two factors would only cost more"
            raise EmbeddingsError(f"{type(self).__name__} with cost {unit}", reason)
        self._written = False

    # What a method says.

    @property
    def importance(self) -> Importance[Any]:
        """What the method measures of the layers; nothing, unless a subclass says otherwise."""
        return Nothing()

    def why_no_energies(self) -> str:
        """Why the method cannot say what a singular group is worth to the loss; empty where it can."""
        return "it looks at each weight by itself"

    @classmethod
    def why_not_sharded(cls) -> str:
        """It can: shapes are final before training starts."""
        return ""

    @abstractmethod
    def decompose(self, weight: Tensor, measured: LayerImportance | None, samples: int) -> Decomposition:
        """Prepares one weight for any rank.

        Args:
            weight: `[m, n]`, finite.
            measured: What `importance` measured of the layer; `None` where nothing is needed.
            samples: How many samples it was measured on.
        """

    def options(self) -> dict[str, Any]:
        """What identifies the method in reports, as primitives."""
        return {
            "keep_ratio": self.keep_ratio,
            "rank_ratio": self.rank_ratio,
            "multiple_of": self.multiple_of,
            "overrides": [vars(override) for override in self.overrides],
            "cost": self.cost.options(),
            "form": self.form,
            "allocation": self.allocation.options(),
            **({"labels": self.calibration.labels} if self.importance.needs_data else {}),
            **({} if self.recalibration is None else {"recalibration": self.recalibration.options()}),
            **({} if self.refit is None else {"refit": self.refit.options()}),
        }

    # Planning.

    @property
    def measure(self) -> Measure:
        """What keep_ratio is a share of."""
        return self.cost

    def plan(self, encoder: nn.Module) -> Allocation:
        """The ranks for an encoder; changes nothing. Where ranks depend on data, uniform ones of the same budget.

        Raises:
            NoTargetError, TiedWeightError, BudgetError, RangeError, RankError, OverrideError: bad input.
        """
        return self._request(self.targets.select(encoder)).uniform()

    @property
    def plan_depends_on_data(self) -> bool:
        """Whether ranks follow from calibration: `plan` then shows uniform ones of the same budget."""
        return self.allocation.needs_energies

    def check(self, encoder: nn.Module) -> None:
        """Raises an error for an impossible plan, and weights that are not finite."""
        self.plan(encoder)
        for name, layer in self.targets.select(encoder).items():
            check_finite("the weight", dense_weight(layer), name)

    def _request(self, layers: Mapping[str, nn.Module]) -> RankRequest:
        shapes = self.targets.shapes(layers)
        return RankRequest(shapes, self.keep_ratio, self.rank_ratio, self.multiple_of, self.overrides, self.cost)

    # Inside a run.

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Factorises the module's encoder; one whose run is resumed only gets the shapes that its checkpoint fills.

        Raises:
            NonFiniteError: a targeted weight, a loss or a gradient is NaN or Inf.
            CalibrationError: the method needs data and there are none.
        """
        self._written = False
        module = as_compressible(pl_module)
        layout = module.layout_to_resume
        if layout is None:
            self.compress(trainer, pl_module)
        else:
            conform_(module.encoder, layout)

    def compress(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Factorises the module's encoder now. No optimizer may exist."""
        module = as_compressible(pl_module)
        encoder = module.encoder.to(trainer.strategy.root_device)
        # DDP would do so only after this: a new head is drawn by every process for itself.
        for tensor in encoder.state_dict().values():
            send_(trainer, tensor, 0)
        self.check(encoder)
        layers = self.targets.select(encoder)
        request = self._request(layers)
        uniform = request.uniform()
        if not self.allocation.needs_energies:
            layers = {name: layer for name, layer in layers.items() if uniform.ranks[name] is not None}
        heads = self._tied_heads(encoder, layers)
        before = (
            None if self.recalibration is None else self.recalibration.outputs(trainer, pl_module, self.calibration)
        )
        allocation, told, notes, samples = self._factorise(trainer, pl_module, layers, request)
        options = self.options() | ({} if samples is None else {"calibration_samples": samples})
        exchanged = {name: layers[name] for name in told}
        heads = {head: vocabulary for head, vocabulary in heads.items() if vocabulary in told}
        dense_heads = {head: tie_head_(encoder, head, vocabulary) for head, vocabulary in heads.items()}
        try:
            linears = [name for name, layer in exchanged.items() if not is_embedding(layer)]
            if self.refit is not None and linears:
                dense = exchanged | dense_heads
                notes |= {"refit": self.refit.fit_(trainer, pl_module, self.calibration, dense, linears)}
                told |= {n: told[n] | refitted_errors(layers[n], encoder.get_submodule(n)) for n in linears}
            self._restate(trainer, encoder, layers, told)
            if self.recalibration is not None and before is not None:
                notes |= {"head": self.recalibration.fit_(trainer, pl_module, self.calibration, before)}
        except BaseException:
            for name, layer in exchanged.items():
                replace_module_(encoder, name, layer.to(trainer.strategy.root_device))
            for head, layer in dense_heads.items():
                untie_head_(encoder, head, heads[head], layer)
            raise
        self._written = True
        spent = allocation.total_cost(self.cost)
        cost = CostRecord(self.cost.unit, spent, self.cost.total_dense(allocation.shapes))
        records = self._records(allocation, told)
        module.compression = CompressionRecord(type(self).__name__, options, records, tuple(notes.values()), cost=cost)
        self.mark_prepared(pl_module)

    def _tied_heads(self, encoder: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
        """The heads that use the matrix of a targeted look-up, and its name.

        Raises:
            HeadError: such a head is to be recalibrated, which would change the look-up.
        """
        looked_up = [name for name, layer in layers.items() if is_embedding(layer)]
        heads = {head: name for name in looked_up for head in heads_tied_to(encoder, name)}
        if heads and self.recalibration is not None:
            raise HeadError(type(encoder).__name__, f"{next(iter(heads))!r} has the matrix of the vocabulary")
        return heads

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises an error for resuming from a checkpoint of another method, or of this one with other options.

        Raises:
            ResumeMismatchError: telling the first option that differs.
        """
        super().on_train_start(trainer, pl_module)
        if not self._written:
            raise ResumeMismatchError(f"it was not written by a run with strategy {type(self).__name__}")

    def state_dict(self) -> dict[str, Any]:
        """Whether the factors have been written, and how."""
        return {"written": self._written, "options": self.options()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`'s.

        Raises:
            ResumeMismatchError: the run was configured otherwise.
        """
        self._written = bool(state_dict["written"])
        own = self.options()
        for key, theirs in state_dict.get("options", {}).items():
            if own.get(key) != theirs:
                raise ResumeMismatchError(f"{key}={theirs!r} there, {key}={own.get(key)!r} here")

    # The work.

    def _factorise(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, layers: Mapping[str, nn.Module], request: RankRequest
    ) -> tuple[Allocation, dict[str, dict[str, Any]], dict[str, str], int | None]:
        """Measures layers, allocates ranks, and puts factorised layers into the encoder.

        Returns:
            The ranks; a record of each factorised layer; notes; samples, `None` where nothing was measured.
        """
        decompositions, notes, samples = self._decompose_all(trainer, pl_module, layers)
        allocation = self.allocation.allocate(request, self._energies(trainer, decompositions))
        encoder = as_compressible(pl_module).encoder
        return allocation, self._exchange(trainer, encoder, layers, allocation, decompositions, notes), notes, samples

    def _decompose_all(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, layers: Mapping[str, nn.Module]
    ) -> tuple[dict[str, Decomposition], dict[str, str], int | None]:
        """Measures layers group by group, and decomposes those that are this process's.

        Returns:
            Decompositions of this process's layers; notes by layer; samples, `None` where nothing was measured.
        """
        importance, module = self.importance, as_compressible(pl_module)
        if importance.needs_data and layers and module.freshly_initialised_head:
            logger.warning(
                "the head is freshly initialised: %s will weigh the weights for a task the model has not "
                "learned. Fine-tune first and pass the checkpoint as model.init_args.init_from.",
                type(self).__name__,
            )
        decompositions: dict[str, Decomposition] = {}
        notes: dict[str, str] = {}
        samples: int | None = None
        owners = self._owners(trainer, layers)
        max_memory = self.calibration.max_memory if importance.needs_data else None
        for names in importance.groups(self.targets.shapes(layers), max_memory):
            group = {name: layers[name] for name in names}
            measured: dict[str, LayerImportance] = {}
            if importance.needs_data and group:
                found = measure_importance(trainer, pl_module, group, importance, self.calibration, type(self).__name__)
                measured, samples = found.layers, found.num_samples

            def decompose(
                name: str, measured: dict[str, LayerImportance] = measured, samples: int = samples or 0
            ) -> str | None:
                decompositions[name], note = self._decompose_one(name, layers[name], measured.pop(name, None), samples)
                return note

            told = work_shared(trainer, {name: owners[name] for name in names}, decompose, "Decomposition")
            notes |= {name: note for name, note in told.items() if note is not None}
        return decompositions, notes, samples

    def _decompose_one(
        self, name: str, layer: nn.Module, measured: LayerImportance | None, samples: int
    ) -> tuple[Decomposition, str | None]:
        note = None
        if measured is not None:
            measured.check(name)
            if measured.is_zero:
                note = f"no loss depends on {name!r}: factorised by plain SVD instead"
                logger.warning(note)
        return self.decompose(dense_weight(layer).detach(), measured, samples), note

    def _owners(self, trainer: pl.Trainer, layers: Mapping[str, nn.Module]) -> dict[str, int]:
        """Which process decomposes which layer, by what a decomposition costs up to a constant: `m n min(m, n)`."""
        shapes = self.targets.shapes(layers)
        return assign({n: float(s.dense_params * s.full_rank) for n, s in shapes.items()}, trainer.world_size)

    def _energies(self, trainer: pl.Trainer, decompositions: Mapping[str, Decomposition]) -> dict[str, Tensor]:
        """Those of all processes' layers, on the CPU; empty where ranks do not depend on them."""
        if not self.allocation.needs_energies:
            return {}
        own = {name: d.energies.cpu() for name, d in decompositions.items() if d.energies is not None}
        return {name: energy for share in gathered(trainer, own) for name, energy in share.items()}

    def _exchange(
        self,
        trainer: pl.Trainer,
        encoder: nn.Module,
        layers: Mapping[str, nn.Module],
        allocation: Allocation,
        decompositions: dict[str, Decomposition],
        notes: dict[str, str],
    ) -> dict[str, dict[str, Any]]:
        """Puts factorised layers into the encoder, one at a time; returns a record of each."""
        ranks = {name: rank for name, rank in allocation.ranks.items() if rank is not None}
        owners = {name: owner for name, owner in self._owners(trainer, layers).items() if name in ranks}

        def write(name: str) -> tuple[dict[str, Any], str | None]:
            made = empty_factors(layers[name], ranks[name])
            told, note = write_factors(name, layers[name], made, decompositions.pop(name).at(ranks[name]))
            replace_module_(encoder, name, made)
            return told, note

        written = work_shared(trainer, owners, write, "Factorisation")
        for name, owner in owners.items():
            if owner != trainer.global_rank:
                replace_module_(encoder, name, empty_factors(layers[name], ranks[name]))
            for parameter in encoder.get_submodule(name).parameters():
                send_(trainer, parameter.data, owner)
        notes |= {f"{name} solver": note for name, (_, note) in written.items() if note is not None}
        return {name: told for name, (told, _) in written.items()}

    def _restate(
        self, trainer: pl.Trainer, encoder: nn.Module, layers: Mapping[str, nn.Module], factorised: Collection[str]
    ) -> None:
        """Brings two factors, as refit needs them, to the form in which layers are to be."""
        form = final_form(self.form)
        if form is LowRankLinear:
            return
        linears = {name: layer for name, layer in layers.items() if name in factorised and not is_embedding(layer)}
        owners = self._owners(trainer, linears)

        def restate(name: str) -> None:
            replace_module_(encoder, name, restated(encoder.get_submodule(name), form))

        work_shared(trainer, owners, restate, "Pivot rows")
        for name, owner in owners.items():
            layer = cast(LowRankLinear, encoder.get_submodule(name))
            if owner != trainer.global_rank:
                replace_module_(encoder, name, form.empty(layer.spec(), layer))
            for tensor in encoder.get_submodule(name).state_dict().values():
                send_(trainer, tensor, owner)

    def _records(self, allocation: Allocation, told: Mapping[str, dict[str, Any]]) -> tuple[LayerRecord, ...]:
        exact = {"error": 0.0, "weighted_error": 0.0 if self.importance.needs_data else None}
        return tuple(
            LayerRecord.of(
                name, shape, allocation.ranks[name], form_for(shape, allocation.form), **told.get(name, exact)
            )
            for name, shape in allocation.shapes.items()
        )
