"""Ranks reallocated across the whole model while it is fine-tuned."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pl.allocation import Budget, Cost, CubicCurve, CubicSchedule, Measure, Parameters, RankBounds
from lowrank_pl.errors.numerics import NonFiniteError, RangeError
from lowrank_pl.errors.run import (
    BudgetNotReachedError,
    FrozenFactorsError,
    MissingArgumentError,
    ResumeMismatchError,
)
from lowrank_pl.importance import FirstOrder, Groups, GroupSensitivity
from lowrank_pl.nn import SVDLinear
from lowrank_pl.strategies.base import CompressionStrategy, as_compressible
from lowrank_pl.strategies.rank_plan import RankPlan
from lowrank_pl.strategies.rank_state import RankState, Reallocation
from lowrank_pl.surgery import (
    CompressionRecord,
    ModelLayout,
    TargetSelector,
    compact_,
    keep_groups_,
    read_layout,
    replace_module_,
    svd_layers,
)

logger = logging.getLogger(__name__)


class RankDyna(CompressionStrategy):
    """Dynamic rank pruning: one round of fine-tuning from the pre-trained model ends at the budget.

    Every targeted weight becomes its singular value decomposition, all three parts trained. The singular groups of all
    layers compete: from time to time those with the lowest scores are dropped for good, until the budget that the
    schedule allows is met; the last steps train what is left. No parameter changes its shape while an optimizer exists.

    References:
        Hua et al., Dynamic low-rank estimation for transformer-based language models, EMNLP Findings 2023 (one round,
        groups ranked across the model by the change of the loss). The score to first order, the schedule's defaults and
        everything below `sensitivity` are this project's.

    Args:
        keep_ratio: The budget as share of what the targeted weights cost when dense, `0 < keep_ratio <= 1`.
        parameters: Instead, as parameters of the targeted weights.
        model_parameters: Instead, as parameters of the whole model.
        schedule: When the budget shrinks.
        sensitivity: How groups are scored.
        per_parameter: Whether groups compete by score per parameter (per unit of `cost`), so that a group of a large
            matrix must be worth more than one of a small matrix.
        start_ratio: Share of the full rank to start with, `0 < start_ratio <= 1`; below 1 the smallest singular values
            go before the first step.
        bounds: How few and how many groups layers may end with.
        multiple_of: Bring the final ranks to a multiple, within the budget.
        allow_dense: Let a layer that ends at or above its break-even rank end dense, and count it as such.
        cost: In what the budget is measured, and groups are paid: `Parameters`, `Flops`, or `Latency` with a table of
            times.
        targets: Which layers to factorise.
    """

    def __init__(
        self,
        keep_ratio: float | None = None,
        parameters: int | None = None,
        model_parameters: int | None = None,
        schedule: CubicSchedule | None = None,
        sensitivity: GroupSensitivity | None = None,
        per_parameter: bool = True,
        start_ratio: float = 1.0,
        bounds: list[RankBounds] | None = None,
        multiple_of: int = 1,
        allow_dense: bool = False,
        cost: Measure | None = None,
        targets: TargetSelector | None = None,
    ) -> None:
        super().__init__(targets)
        self.budget = Budget(keep_ratio, parameters, model_parameters)
        if not 0 < start_ratio <= 1:
            raise RangeError("start_ratio", start_ratio, "0 < start_ratio <= 1, a share of the full rank")
        if multiple_of < 1:
            raise RangeError("multiple_of", multiple_of, "a whole number from 1")
        self.schedule = schedule or CubicSchedule()
        self.sensitivity = sensitivity or FirstOrder()
        self.per_parameter = per_parameter
        self.start_ratio = start_ratio
        self.bounds = bounds or []
        self.multiple_of = multiple_of
        self.cost = Cost(allow_dense, cost or Parameters())
        self.state = RankState()
        self.latest_scores: dict[str, Tensor] = {}
        self._plan = RankPlan()
        self._curve: CubicCurve | None = None
        self._restored: RankState | None = None

    @property
    def measure(self) -> Measure:
        """The unit of the budget."""
        return self.cost.measure

    @property
    def frame(self) -> RankPlan:
        """The layers, where they start, and what ranks cost; empty before `prepare`."""
        return self._plan

    @property
    def at_budget(self) -> bool:
        """Whether the model has the size that was asked for."""
        return self.state.reached

    def plan(self, encoder: nn.Module) -> None:
        """Refuses an impossible budget; ranks are known only in the end."""
        self._plan_for(encoder)

    def prepare(self, encoder: nn.Module) -> None:
        """Replaces every target by its singular value decomposition.

        Raises:
            BudgetError, BudgetAboveStartError, OverrideError, NonFiniteError: before anything is changed.
        """
        self._plan = self._plan_for(encoder)
        self.state = RankState(self._plan.budget, dict(self._plan.capacities))
        self._restored = None
        for name, linear in self.targets.select(encoder).items():
            replace_module_(encoder, name, SVDLinear.from_linear(linear, self._plan.capacities[name]))

    def _plan_for(self, encoder: nn.Module) -> RankPlan:
        return RankPlan.of(encoder, self.targets, self.budget, self.bounds, self.start_ratio, self.cost)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Derives the schedule from the length of the run, or goes on where a stopped run was.

        Raises:
            MissingArgumentError: nobody knows how long the run is.
            ScheduleError: the schedule does not fit into it.
            ResumeMismatchError: the run that is resumed had another budget or other layers.
            OptimizerCoverageError, FrozenFactorsError: factors that would not be trained.
        """
        super().on_train_start(trainer, pl_module)
        layers = svd_layers(as_compressible(pl_module).encoder)
        frozen = [name for name, layer in layers.items() if not layer.sigma.requires_grad]
        if frozen:
            raise FrozenFactorsError(frozen)
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise MissingArgumentError(
                "the length of the run", "Set trainer.max_epochs or trainer.max_steps: ranks shrink over its length."
            )
        self._curve = self.schedule.over(int(steps))
        if self._restored is not None:
            self.state.check_continues(self._restored)
            if self._restored.total_steps != int(steps) and not self._restored.reached:
                logger.warning(
                    "the run is now %d optimizer steps long, it was %d: the schedule is that of the new length",
                    steps,
                    self._restored.total_steps,
                )
            self._take_over()
        elif trainer.ckpt_path is not None:
            raise ResumeMismatchError(f"it was not written by a run with strategy {type(self).__name__}")
        self.state.total_steps = int(steps)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Observes the gradients: unscaled, averaged over processes, not yet clipped."""
        del trainer, optimizer
        if self.state.reached:
            return
        layers = svd_layers(as_compressible(pl_module).encoder)
        if not self.sensitivity.observe({name: _groups(layer) for name, layer in layers.items()}):
            if self.state.skipped == 0:
                logger.warning("a gradient is not finite: such steps do not count for the scores of singular groups")
            self.state.skipped += 1

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Reallocates ranks where the schedule says so, once per optimizer step."""
        del outputs, batch, batch_idx
        step = trainer.global_step
        if self.state.reached or step == self.state.step:
            return  # within an accumulation no optimizer step has happened
        self.state.step = step
        assert self._curve is not None
        if self._curve.acts(step) or step >= self._curve.end:
            self._reallocate(trainer, pl_module, step)

    def _reallocate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        assert self._curve is not None
        module = as_compressible(pl_module)
        layers = svd_layers(module.encoder)
        final = step >= self._curve.end
        budget = (
            float(self.state.budget) if final else self._curve.budget(step, self._plan.start_cost, self.state.budget)
        )
        if self.sensitivity.steps == 0:
            if not final:
                return
            raise NonFiniteError("every gradient so far")
        self.latest_scores = {name: self.sensitivity.scores(name) for name in layers}
        # Scores are equal on all processes up to rounding; the first one decides, so that ranks are equal exactly.
        chosen = {}
        if trainer.is_global_zero:
            chosen = self._plan.choose(self.latest_scores, budget, self.per_parameter, final, self.multiple_of)
        kept = trainer.strategy.broadcast(chosen)
        for name, layer in layers.items():
            if len(kept[name]) < layer.rank:
                keep_groups_(layer, kept[name], trainer.optimizers)
                self.sensitivity.keep(name, kept[name])
        self.state.reached = final
        ranks = {name: layer.rank for name, layer in layers.items()}
        self.state.history.append(Reallocation(step, budget, self._plan.kept(ranks), ranks))
        module.compression = self._record(ranks)
        if final:
            told = (self.state.budget, self.cost.measure.unit, step, self.state.history[-1].kept)
            logger.info("the budget of %d %s is reached at step %d: %d kept", *told)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compacts the model: no step follows."""
        del trainer
        self._compact(pl_module)

    def _compact(self, pl_module: pl.LightningModule) -> None:
        self._take_over()
        module = as_compressible(pl_module)
        ranks = {name: layer.rank for name, layer in svd_layers(module.encoder).items()}
        if ranks:
            module.compression = self._record(ranks)
            self.finalize(module.encoder)

    def finalize(self, encoder: nn.Module) -> ModelLayout:
        """Turns the layers into two factors of exact rank each, or into dense ones where that is allowed and smaller.

        Returns:
            The layout of the encoder after it.
        """
        ranks = {name: layer.rank for name, layer in svd_layers(encoder).items()}
        compact_(encoder, self._plan.dense_layers(ranks))
        return read_layout(encoder)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes a run fail that has ended before the budget was reached; compacts one that was resumed at its end.

        Raises:
            BudgetNotReachedError: everything has been saved and reported; the model is larger than asked.
        """
        if stage == "fit" and self.state.capacities:
            self._compact(pl_module)
        if stage == "fit" and self.state.capacities and not self.state.reached and trainer.global_step > 0:
            kept = self.state.history[-1].kept if self.state.history else self._plan.start_cost
            told = (kept, self.state.budget, trainer.global_step, self.state.total_steps)
            raise BudgetNotReachedError(*told, unit=self.cost.measure.unit)

    def state_dict(self) -> dict[str, Any]:
        """The scores and where the run stands."""
        return {"ranks": self.state.to_dict(), "sensitivity": self.sensitivity.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores `state_dict`'s; whether it fits is looked at in `on_train_start`."""
        self._restored = RankState.from_dict(state_dict["ranks"])
        self.sensitivity.load_state_dict(state_dict["sensitivity"])

    def options(self) -> dict[str, Any]:
        """What identifies the method in reports, as primitives."""
        sensitivity = {k: v for k, v in vars(self.sensitivity).items() if not k.startswith("_")}
        return {
            **vars(self.budget),
            "schedule": dict(vars(self.schedule)),
            "sensitivity": {"class": type(self.sensitivity).__name__, **sensitivity},
            "per_parameter": self.per_parameter,
            "start_ratio": self.start_ratio,
            "bounds": [dict(vars(bound)) for bound in self.bounds],
            "multiple_of": self.multiple_of,
            "allow_dense": self.cost.allow_dense,
            "cost": self.cost.measure.options(),
        }

    def _take_over(self) -> None:
        """Goes on from a restored state; a run that was resumed at its very end does not even start training."""
        if self._restored is not None:
            self.state, self._restored = self._restored, None

    def _record(self, ranks: Mapping[str, int]) -> CompressionRecord:
        notes = []
        if not self.state.reached:
            notes.append(f"the budget of {self.state.budget:,} {self.cost.measure.unit} has not been reached")
        if self.state.skipped:
            notes.append(f"{self.state.skipped} optimizer steps with gradients that are not finite were left out")
        return CompressionRecord(type(self).__name__, self.options(), self._plan.records(ranks), tuple(notes))


def _groups(layer: SVDLinear) -> Groups:
    """The groups that count; a layer that took no part in the step has gradients of zero."""
    rank = layer.rank
    left, sigma, right = (p if p.grad is None else p.grad for p in (layer.left, layer.sigma, layer.right))
    if layer.sigma.grad is None:
        left, sigma, right = (torch.zeros_like(tensor) for tensor in (left, sigma, right))
    return Groups(
        layer.left.detach()[:, :rank],
        layer.sigma.detach()[:rank],
        layer.right.detach()[:rank],
        left[:, :rank],
        sigma[:rank],
        right[:rank],
    )
