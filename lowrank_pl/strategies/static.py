"""Measure, allocate, factorise once; then tune on."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lowrank_pl.allocation import Allocation, Allocator, LayerOverride, Measure, Parameters, RankRequest, Uniform
from lowrank_pl.allocation.uniform import check_share
from lowrank_pl.core.checks import check_finite
from lowrank_pl.errors.budget import AllocationError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import EmbeddingsError, ResumeMismatchError
from lowrank_pl.errors.targets import HeadError
from lowrank_pl.importance import Importance, LayerImportance, Nothing
from lowrank_pl.nn import (
    FinalForm,
    LowRankLinear,
    dense_weight,
    final_form,
    form_for,
    is_embedding,
)
from lowrank_pl.strategies.base import CompressionStrategy, as_compressible
from lowrank_pl.strategies.calibration import Calibration, calibration_batches, check_calibration
from lowrank_pl.strategies.decomposition import Decomposition
from lowrank_pl.strategies.labels import ObservedLabels
from lowrank_pl.strategies.layer_factoriser import LayerFactoriser, Record
from lowrank_pl.strategies.processes import send_
from lowrank_pl.strategies.recalibration import Recalibration
from lowrank_pl.strategies.refit import Refit, refitted_errors
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
            are close to the dense model's: `true` for `Recalibration()`, or one with other settings; none by default.
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
        recalibration: Recalibration | bool | None = None,
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
        if not isinstance(recalibration, (Recalibration, bool, type(None))):
            raise RangeError("recalibration", recalibration, "true, false or a Recalibration")
        self.recalibration = Recalibration() if recalibration is True else recalibration or None
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
            AlreadyFactorisedError: a part of the targets is factorised.
            NoTargetError, TiedWeightError, BudgetError, RangeError, RankError, OverrideError: bad input.
        """
        self.targets.check_dense(encoder)
        return self._request(self.targets.select(encoder)).uniform()

    @property
    def plan_depends_on_data(self) -> bool:
        """Whether ranks follow from calibration: `plan` then shows uniform ones of the same budget."""
        return self.allocation.needs_energies

    def told_beforehand(self, encoder: nn.Module, item: int, tokens: int | None) -> list[str]:
        """See `CompressionStrategy.told_beforehand`: what is measured of the layers."""
        del item, tokens
        importance, shapes = self.importance, self.targets.shapes(self.candidates(encoder))
        if not importance.needs_data or not shapes:
            return []
        groups = importance.groups(shapes, self.calibration.max_memory)
        most = max(sum(importance.bytes(shapes[name]) for name in names) for names in groups)
        passes = "one pass" if len(groups) == 1 else f"{len(groups)} passes"
        return [
            f"{type(self).__name__} measures the layers in {passes} over the calibration samples: at most "
            f"{most / 2**20:,.1f} MiB of sums at a time, which calibration.max_memory bounds"
        ]

    @property
    def measured_of_dense(self) -> Importance[Any] | None:
        """What is measured of the dense layers, group by group; `None` for nothing."""
        return self.importance if self.importance.needs_data else None

    def candidates(self, encoder: nn.Module) -> dict[str, nn.Module]:
        """The targeted layers but those that are known to stay dense before anything is measured."""
        layers, ranks = self.targets.select(encoder), self.plan(encoder).ranks
        return {name: layer for name, layer in layers.items() if self.allocation.needs_energies or ranks[name]}

    def check(self, encoder: nn.Module) -> None:
        """Raises an error for an impossible plan, weights that are not finite, and memory that is too short."""
        self.plan(encoder)
        for name, layer in self.targets.select(encoder).items():
            check_finite("the weight", dense_weight(layer), name)
        if self.measured_of_dense is not None:
            shapes = self.targets.shapes(self.candidates(encoder))
            self.measured_of_dense.groups(shapes, self.calibration.max_memory)

    def check_compress(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also asks for the calibration samples, where there is something to do with them, and looks at the head.

        Raises:
            CalibrationError, MissingSplitError: there are no samples.
            NotCompressibleError, LabelsError: the module cannot tell of them what is asked for.
            HeadError: the head cannot be recalibrated.
        """
        super().check_compress(trainer, pl_module)
        if self.importance.needs_data:
            batches = check_calibration(trainer, pl_module, self.calibration, type(self).__name__)
            if self.calibration.labels == "observed":
                next(iter(ObservedLabels(pl_module, batches)), None)  # raises where there are none
        if self.refit is not None:
            calibration_batches(trainer, self.calibration, "refit", self.refit.max_samples)
        if self.recalibration is not None:
            self.recalibration.check(trainer, pl_module, self.calibration)

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
        request = self._request(self.targets.select(encoder))
        layers = self.candidates(encoder)
        heads = self._tied_heads(encoder, layers)
        before = None
        if self.recalibration is not None:
            self.recalibration.check(trainer, pl_module, self.calibration)  # `fit` has not done so before
            before = self.recalibration.outputs(trainer, pl_module, self.calibration)
        tokens = getattr(getattr(trainer, "datamodule", None), "max_length", None)
        for line in self.told_beforehand(encoder, next(encoder.parameters()).element_size(), tokens):
            rank_zero_info(line)
        run = LayerFactoriser(self, trainer, pl_module, layers)
        dense_heads: dict[str, nn.Module] = {}
        try:
            allocation, told = self._factorise(run, request)
            for head, vocabulary in heads.items():
                if vocabulary in told:
                    dense_heads[head] = tie_head_(encoder, head, vocabulary)
            linears = [name for name in told if not is_embedding(layers[name])]
            if self.refit is not None and linears:
                dense = {name: layers[name] for name in told} | dense_heads
                run.notes |= {"refit": self.refit.fit_(trainer, pl_module, self.calibration, dense, linears)}
                told |= {n: told[n] | refitted_errors(layers[n], encoder.get_submodule(n)) for n in linears}
            if (form := final_form(self.form)) is not LowRankLinear:
                run.restate_(form, linears)
            if self.recalibration is not None and before is not None:
                run.notes |= {"head": self.recalibration.fit_(trainer, pl_module, self.calibration, before)}
        except BaseException:
            for name, layer in layers.items():
                if encoder.get_submodule(name) is not layer:
                    replace_module_(encoder, name, layer.to(trainer.strategy.root_device))
            for head, layer in dense_heads.items():
                untie_head_(encoder, head, heads[head], layer)
            raise
        options = self.options() | ({} if run.samples is None else {"calibration_samples": run.samples})
        self._written = True
        spent = allocation.total_cost(self.cost)
        cost = CostRecord(self.cost.unit, spent, self.cost.total_dense(allocation.shapes))
        records = self._records(allocation, told)
        module.compression = CompressionRecord(
            type(self).__name__, options, records, tuple(run.notes.values()), cost=cost
        )
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

    def _factorise(self, run: LayerFactoriser, request: RankRequest) -> tuple[Allocation, dict[str, Record]]:
        """Measures layers, allocates ranks, and puts factorised layers into the encoder.

        Returns:
            The ranks; a record of each factorised layer.
        """
        made = run.decompose_all(run.layers)
        energies = run.energies(made) if self.allocation.needs_energies else {}
        allocation = self.allocation.allocate(request, energies)
        ranks = {name: rank for name, rank in allocation.ranks.items() if rank is not None}
        return allocation, run.exchange_(ranks, made)

    def _records(self, allocation: Allocation, told: Mapping[str, dict[str, Any]]) -> tuple[LayerRecord, ...]:
        exact = {"error": 0.0, "weighted_error": 0.0 if self.importance.needs_data else None}
        return tuple(
            LayerRecord.of(
                name, shape, allocation.ranks[name], form_for(shape, allocation.form), **told.get(name, exact)
            )
            for name, shape in allocation.shapes.items()
        )
