"""Factorise once, at ranks known beforehand; then tune on."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lowrank_pl.allocation import Allocation, LayerOverride, Measure, Parameters, uniform_ranks
from lowrank_pl.allocation.uniform import check_share
from lowrank_pl.core import Factors, relative_error
from lowrank_pl.core.checks import check_finite, check_importance
from lowrank_pl.core.elementwise.solver import DIVERGED
from lowrank_pl.errors.run import NotFactorisedError, ResumeMismatchError
from lowrank_pl.importance import Fisher, FisherKind, LayerFisher
from lowrank_pl.nn import LowRankLinear
from lowrank_pl.strategies.base import CompressionStrategy, as_compressible
from lowrank_pl.strategies.calibration import Calibration, measure_fisher, progress
from lowrank_pl.surgery import CompressionRecord, LayerRecord, TargetSelector, replace_module_

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factorised:
    """What a method made of one weight.

    Attributes:
        factors: Of the rank asked for.
        weighted_error: Relative error in the weighted norm that the method minimises; `None` for plain SVD.
        losses: The curve of the objective, for iterative methods.
        outcome: Why an iterative method stopped.
    """

    factors: Factors
    weighted_error: float | None = None
    losses: tuple[float, ...] = ()
    outcome: str | None = None


class StaticStrategy(CompressionStrategy):
    """Common part of the methods that factorise each layer once.

    In `fit`, `prepare` puts empty layers of the final ranks into the encoder and sets the dense originals
    aside; `on_train_start` calibrates with the originals and writes the factors in place; training goes on from
    there. In `compress` the same happens without a training step.

    Args:
        keep_ratio: Share of what each targeted layer costs to keep, `0 < keep_ratio <= 1`.
        rank_ratio: Instead of keep_ratio, the papers' measure: rank `int(rank_ratio * min(out, in))`.
        multiple_of: Round ranks to multiples, all layers together within keep_ratio.
        overrides: Exceptions for layers by name.
        targets: Which layers to factorise.
        calibration: How importance is measured; unused by methods that need none.
        cost: What keep_ratio is a share of: `Parameters`, `Flops`, or `Latency` with a table of times.
    """

    fisher_kind: FisherKind | None = None
    """How much of the Fisher information the method needs."""

    def __init__(
        self,
        keep_ratio: float | None = None,
        rank_ratio: float | None = None,
        multiple_of: int = 1,
        overrides: list[LayerOverride] | None = None,
        targets: TargetSelector | None = None,
        calibration: Calibration | None = None,
        cost: Measure | None = None,
    ) -> None:
        super().__init__(targets)
        check_share(keep_ratio, rank_ratio, multiple_of)
        self.keep_ratio = keep_ratio
        self.rank_ratio = rank_ratio
        self.multiple_of = multiple_of
        self.overrides: Sequence[LayerOverride] = overrides or []
        self.calibration = calibration or Calibration()
        self.cost = cost or Parameters()
        self._allocation: Allocation | None = None
        self._originals: dict[str, nn.Linear] = {}
        self._written = False

    @property
    def measure(self) -> Measure:
        """What keep_ratio is a share of."""
        return self.cost

    @abstractmethod
    def factorise(self, weight: Tensor, rank: int, fisher: LayerFisher | None, samples: int) -> Factorised:
        """Factorises one weight `[m, n]` at a rank; `fisher`, from so many samples, is `None` where none is needed."""

    def plan(self, encoder: nn.Module) -> Allocation:
        """The ranks for an encoder; changes nothing.

        Raises:
            NoTargetError, TiedWeightError, BudgetError, RangeError, RankError, OverrideError: bad input.
        """
        shapes = self.targets.shapes(self.targets.select(encoder))
        return uniform_ranks(shapes, self.keep_ratio, self.rank_ratio, self.multiple_of, self.overrides, self.cost)

    def check(self, encoder: nn.Module) -> None:
        """Refuses an impossible plan, and weights that are not finite."""
        self.plan(encoder)
        for name, linear in self.targets.select(encoder).items():
            check_finite("the weight", linear.weight, name)

    def prepare(self, encoder: nn.Module) -> None:
        """Puts empty factorised layers into the encoder and keeps the dense ones for calibration.

        Raises:
            NonFiniteError: a targeted weight contains NaN or Inf.
        """
        self.check(encoder)
        allocation = self.plan(encoder)
        targets = self.targets.select(encoder)
        self._allocation = allocation
        self._originals = {}
        self._written = False
        for name, rank in allocation.ranks.items():
            if rank is not None:
                self._originals[name] = targets[name]
                replace_module_(encoder, name, LowRankLinear.like(targets[name], rank))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrates and writes the factors, unless a resumed run has done so before."""
        super().on_train_start(trainer, pl_module)
        if not self._written:
            if trainer.ckpt_path is not None:
                raise ResumeMismatchError(f"it was not written by a run with strategy {type(self).__name__}")
            self._write(trainer, pl_module)
        self._originals = {}

    def compress(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Factorises the module's encoder now. No optimizer may exist."""
        self.prepare(as_compressible(pl_module).encoder)
        self._write(trainer, pl_module)
        self._originals = {}

    def state_dict(self) -> dict[str, Any]:
        """Whether the factors have been written."""
        return {"written": self._written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`'s."""
        self._written = bool(state_dict["written"])

    def options(self) -> dict[str, Any]:
        """What identifies the method in reports, as primitives."""
        return {
            "keep_ratio": self.keep_ratio,
            "rank_ratio": self.rank_ratio,
            "multiple_of": self.multiple_of,
            "overrides": [vars(override) for override in self.overrides],
            "cost": self.cost.options(),
        }

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = as_compressible(pl_module)
        assert self._allocation is not None
        for linear in self._originals.values():
            linear.to(pl_module.device)
        options = self.options()
        fisher: Fisher | None = None
        if self.fisher_kind is not None and self._originals:
            if module.freshly_initialised_head:
                logger.warning(
                    "the head is freshly initialised: %s will weigh the weights for a task the model has not "
                    "learned. Fine-tune first and pass the checkpoint as model.init_args.init_from.",
                    type(self).__name__,
                )
            name = type(self).__name__
            fisher = measure_fisher(trainer, pl_module, self._originals, self.fisher_kind, self.calibration, name)
            options["calibration_samples"] = fisher.num_samples
        notes: list[str] = []
        told: dict[str, dict[str, Any]] = {}
        if trainer.is_global_zero:
            for name in progress(trainer, self._originals, "Factorisation", len(self._originals)):
                told[name] = self._write_layer(module.encoder, name, fisher, notes)
        self._synchronise(module.encoder)
        told, notes = trainer.strategy.broadcast((told, notes))
        self._written = True
        module.compression = CompressionRecord(type(self).__name__, options, self._layers(told), tuple(notes))

    def _write_layer(self, encoder: nn.Module, name: str, fisher: Fisher | None, notes: list[str]) -> dict[str, Any]:
        """Writes one layer's factors; returns what its record tells of them."""
        layer = encoder.get_submodule(name)
        if not isinstance(layer, LowRankLinear):
            raise NotFactorisedError(type(self).__name__, [name])
        weight = self._originals[name].weight.detach()
        layer_fisher = fisher.layers[name] if fisher is not None else None
        if weight.device.type == "mps":  # no float64 there
            weight = weight.cpu()
            layer_fisher = layer_fisher.to("cpu") if layer_fisher is not None else None
        if layer_fisher is not None and not bool(layer_fisher.input_sums.any()):
            note = f"the Fisher information of {name!r} is zero everywhere: factorised by plain SVD instead"
            logger.warning(note)
            notes.append(note)
        if layer_fisher is not None:
            _check_fisher(name, layer_fisher)
        found = self.factorise(weight, layer.rank, layer_fisher, fisher.num_samples if fisher is not None else 0)
        if found.outcome is not None and found.outcome.startswith(DIVERGED):
            notes.append(f"the solver of {name!r} {found.outcome}: the best of its iterates is used")
        layer.assign_(found.factors)
        return {
            "error": relative_error(weight, found.factors.product()),
            "weighted_error": found.weighted_error,
            "losses": found.losses,
            "outcome": found.outcome,
        }

    def _synchronise(self, encoder: nn.Module) -> None:
        """Gives every process the first one's factors, bit for bit."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for name in self._originals:
                for parameter in encoder.get_submodule(name).parameters():
                    torch.distributed.broadcast(parameter.data, src=0)

    def _layers(self, told: dict[str, dict[str, Any]]) -> tuple[LayerRecord, ...]:
        assert self._allocation is not None
        records = []
        for name, shape in self._allocation.shapes.items():
            rank = self._allocation.ranks[name]
            exact = {"error": 0.0, "weighted_error": 0.0 if self.fisher_kind is not None else None}
            records.append(
                LayerRecord(
                    name,
                    shape.out_features,
                    shape.in_features,
                    shape.full_rank if rank is None else rank,
                    "dense" if rank is None else "low_rank",
                    self._allocation.parameters(name),
                    **told.get(name, exact),
                )
            )
        return tuple(records)


def _check_fisher(name: str, fisher: LayerFisher) -> None:
    """Refuses an importance that is negative or not finite, with the layer's name and the entry."""
    for what, importance in (("sums by input", fisher.input_sums), ("sums by output", fisher.output_sums)):
        check_importance(f"the Fisher information ({what}) of layer {name!r}", importance, tuple(importance.shape))
    if fisher.full is not None:
        check_importance(f"the Fisher information of layer {name!r}", fisher.full, tuple(fisher.full.shape))
