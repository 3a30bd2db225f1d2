"""Ranks reallocated across the whole model while it is fine-tuned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pl.allocation import Budget, Cost, CubicCurve, CubicSchedule, Measure, Parameters, RankBounds
from lowrank_pl.errors.budget import AlreadyCompactedError, BudgetNotReachedError
from lowrank_pl.errors.numerics import NonFiniteError, RangeError
from lowrank_pl.errors.run import FrozenFactorsError, ResumeMismatchError
from lowrank_pl.importance import GroupSensitivity, KroneckerSensitivity, Sensitivity
from lowrank_pl.nn import FinalForm, final_form, forms_in_training
from lowrank_pl.strategies.averaging import averaged_models, match_ranks_
from lowrank_pl.strategies.base import CompressionStrategy, as_compressible
from lowrank_pl.strategies.compiling import varying_ranks
from lowrank_pl.strategies.gradient_scale import gradient_scale
from lowrank_pl.strategies.group_training import GroupTraining
from lowrank_pl.strategies.metric_groups import MetricGroups
from lowrank_pl.strategies.processes import gathered
from lowrank_pl.strategies.rank_plan import RankPlan
from lowrank_pl.strategies.rank_state import RankState, Reallocation
from lowrank_pl.strategies.rankdyna_report import record_of, told_of, warn_of_worthless
from lowrank_pl.strategies.rewarming import Rewarming
from lowrank_pl.strategies.run_length import optimizer_steps
from lowrank_pl.strategies.singular_groups import SingularGroups
from lowrank_pl.surgery import (
    CompressionRecord,
    ModelLayout,
    TargetSelector,
    compact_,
    read_layout,
    replace_module_,
)

logger = logging.getLogger(__name__)


class RankDyna(CompressionStrategy):
    """Dynamic rank pruning: one round of fine-tuning from the pre-trained model ends at the budget.

    The groups of all layers compete for the budget, which shrinks on a schedule: a few times during training those
    that the loss depends on least are dropped for good, and the last steps train what is left. By default the present
    weights are decomposed anew each time, in the metric of the loss (`KroneckerSensitivity`), and are trained dense
    before the first time. With one of the other scores (`FirstOrder` and its like) every weight is its singular value
    decomposition from the start, all three parts trained. No parameter changes its shape while an optimizer exists.

    References:
        Hua et al., Dynamic low-rank estimation for transformer-based language models, EMNLP Findings 2023 (one round,
        groups ranked across the model by the change of the loss). That is read to first order by `FirstOrder`, to
        second order by `KroneckerSensitivity`; the schedule's defaults and everything else is this project's.

    Args:
        keep_ratio: The budget as share of what the targeted weights cost when dense, `0 < keep_ratio <= 1`.
        parameters: Instead, as parameters of the targeted weights.
        model_parameters: Instead, as parameters of the whole model.
        schedule: When the budget shrinks. By default four times, from 0.35 of the run on, down to the budget at half of
            the run; with another score than `KroneckerSensitivity` as in `CubicSchedule`.
        sensitivity: What is known of groups: `KroneckerSensitivity`, or a score of groups that stay what they are.
        floor: With `KroneckerSensitivity` every layer keeps at least this share of the rank that uniform ranks would
            give it, `0 <= floor <= 1`.
        per_parameter: With other scores, whether groups compete by score per parameter (per unit of `cost`), so that a
            group of a large matrix must be worth more than one of a small matrix.
        start_ratio: With other scores, share of the full rank to start with, `0 < start_ratio <= 1`; below 1 the
            smallest singular values go before the first step.
        bounds: How few and how many groups layers may end with.
        multiple_of: Bring ranks to multiples, within the budget.
        allow_dense: Let a layer that ends at or above its break-even rank end dense, and count it as such.
        cost: In what the budget is measured, and groups are paid: `Parameters`, `Flops`, or `Latency` with a table of
            times.
        targets: Which layers to factorise.
        form: In what layers end: `low_rank`, two factors, or `pivoted`, the same functions with `r (m + n − r)`
            parameters, which is what the budget counts from the start. Training itself is in two factors; with
            `KroneckerSensitivity` they have to fit into the place of the dense weight, so ranks end below
            `m n / (m + n)`, or dense.
    """

    shrinks: ClassVar[bool] = True

    def __init__(
        self,
        keep_ratio: float | None = None,
        parameters: int | None = None,
        model_parameters: int | None = None,
        schedule: CubicSchedule | None = None,
        sensitivity: Sensitivity | None = None,
        floor: float = 0.25,
        per_parameter: bool = True,
        start_ratio: float = 1.0,
        bounds: list[RankBounds] | None = None,
        multiple_of: int = 1,
        allow_dense: bool = True,
        cost: Measure | None = None,
        targets: TargetSelector | None = None,
        form: FinalForm = "low_rank",
    ) -> None:
        super().__init__(targets)
        self.form = form
        measure = (cost or Parameters()).in_form(final_form(form))
        self.budget = Budget(keep_ratio, parameters, model_parameters)
        if not 0 < start_ratio <= 1:
            raise RangeError("start_ratio", start_ratio, "0 < start_ratio <= 1, a share of the full rank")
        if not 0 <= floor <= 1:
            raise RangeError("floor", floor, "0 <= floor <= 1, a share of the uniform rank")
        if multiple_of < 1:
            raise RangeError("multiple_of", multiple_of, "a whole number from 1")
        self.sensitivity = sensitivity or KroneckerSensitivity()
        self.floor = floor
        self.per_parameter = per_parameter
        self.start_ratio = start_ratio
        self.bounds = bounds or []
        self.multiple_of = multiple_of
        self.allow_dense = allow_dense
        self._training: GroupTraining
        if isinstance(self.sensitivity, KroneckerSensitivity):
            for name, value, neutral in (("start_ratio", start_ratio, 1.0), ("per_parameter", per_parameter, True)):
                if value != neutral:
                    allowed = f"{neutral!r} with KroneckerSensitivity, or another sensitivity such as FirstOrder"
                    raise RangeError(name, value, allowed)
            self.schedule = schedule or CubicSchedule()
            self.cost = Cost(True, measure)  # layers are dense first, whatever they are in the end
            self._training = MetricGroups(self.sensitivity, floor, multiple_of, allow_dense)
        elif isinstance(self.sensitivity, GroupSensitivity):
            self.schedule = schedule or CubicSchedule(warmup=0.05, cooldown=0.5, interval=0.02)
            self.cost = Cost(allow_dense, measure)
            self._training = SingularGroups(self.sensitivity, per_parameter, multiple_of)
        else:
            allowed = "KroneckerSensitivity, or a GroupSensitivity such as FirstOrder"
            raise RangeError("sensitivity", type(self.sensitivity).__name__, allowed)
        self.state = RankState()
        self.latest_scores: dict[str, Tensor] = {}
        self._plan = RankPlan()
        self._curve: CubicCurve | None = None
        self._restored: RankState | None = None
        self._compiling: ExitStack | None = None
        self._rewarming: Rewarming | None = None

    @classmethod
    def why_not_sharded(cls) -> str:
        """Singular groups lie across the parts."""
        return (
            "it scores singular groups by their gradients and moves them, whole columns and rows with their optimizer "
            "state, of which each process would have a part"
        )

    @classmethod
    def why_no_embeddings(cls) -> str:
        """Its forms of training are those of linear layers."""
        return (
            "ranks that shrink in training are those of linear layers; compress the vocabulary with KroneckerSVD and "
            "targets.include=[] before the run (init_from) or after it"
        )

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
        """Raises errors for an impossible budget; ranks are known only in the end."""
        self._plan_for(encoder)

    def told_beforehand(self, encoder: nn.Module, item: int, tokens: int | None) -> list[str]:
        """See `CompressionStrategy.told_beforehand`: budget, reallocations in a run of 1,000 steps, memory."""
        del item, tokens
        return self._told(self._plan_for(encoder), self.schedule.over(1000), 1000)

    def _told(self, plan: RankPlan, curve: CubicCurve, steps: int) -> list[str]:
        sizes = (self._training.bytes(plan), self._training.reallocation_bytes(plan))
        return told_of(type(self).__name__, plan, curve, steps, *sizes)

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replaces every target by a layer whose rank can shrink.

        Raises:
            AlreadyFactorisedError: a part of the targets is factorised.
            BudgetError, BudgetAboveStartError, OverrideError, NonFiniteError: before anything is changed.
        """
        del trainer
        encoder = as_compressible(pl_module).encoder
        self._plan = self._plan_for(encoder)
        self.state = RankState(
            self._plan.budget,
            dict(self._plan.capacities),
            cost=self.cost.measure.identity(),
            sensitivity=type(self.sensitivity).__name__,
        )
        self._restored = None
        self.latest_scores = {}
        self._training.reset()
        for name, linear in self.targets.select(encoder).items():
            replace_module_(encoder, name, self._training.form_of(linear, self._plan.capacities[name]))

    def _plan_for(self, encoder: nn.Module) -> RankPlan:
        self.targets.check_dense(encoder)
        plan = RankPlan.of(encoder, self.targets, self.budget, self.bounds, self.start_ratio, self.cost)
        self._training.check(plan)
        return plan

    @property
    def is_unfinished(self) -> bool:
        """Whether ranks are still to shrink, in a run that did not start at the end of another."""
        return bool(self.state.capacities) and not self.state.reached and self._restored is None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises an error for what is left of a run that ended too early, unless its checkpoint is resumed.

        Raises:
            NoTrainingStepError: the run has no step.
            AlreadyCompactedError: ranks cannot shrink any more.
        """
        super().on_fit_start(trainer, pl_module)
        layers = forms_in_training(as_compressible(pl_module).encoder)
        if not layers and self.state.capacities and not (self._restored or self.state).reached:
            told = (self._kept_so_far(), self.state.budget, self.cost.measure.unit)
            raise AlreadyCompactedError(type(self).__name__, *told)
        if layers:
            self._compiling = ExitStack()
            self._compiling.enter_context(varying_ranks(pl_module, len(layers)))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gives the compiler its settings back, and the optimizer its steps."""
        del trainer, pl_module, exception
        self._leave_compiling()
        self._leave_optimizers()

    def _leave_optimizers(self) -> None:
        if self._rewarming is not None:
            self._rewarming.close()
            self._rewarming = None

    def _leave_compiling(self) -> None:
        if self._compiling is not None:
            self._compiling.close()
            self._compiling = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Derives the schedule from the length of the run, or goes on where a stopped run was.

        A model that an earlier run has brought to its budget is trained on at the ranks it has.

        Raises:
            MissingArgumentError: nobody knows how long the run is.
            ScheduleError: the schedule does not fit into it.
            ResumeMismatchError: the run that is resumed had another budget or other layers.
            OptimizerCoverageError, FrozenFactorsError: factors that would not be trained.
        """
        super().on_train_start(trainer, pl_module)
        module = as_compressible(pl_module)
        layers = forms_in_training(module.encoder)
        if not layers:
            self._restored = None  # of a checkpoint that was only looked at
            rank_zero_info("the budget was reached in an earlier run: training goes on at the ranks of the model")
            return
        frozen = [name for name, layer in layers.items() if not layer.reference.requires_grad]
        if frozen:
            raise FrozenFactorsError(frozen)
        steps = optimizer_steps(trainer)
        self._curve = self.schedule.over(steps)
        if self._restored is not None:
            self.state.check_continues(self._restored)
            if self._restored.total_steps not in (0, steps) and not self._restored.reached:
                logger.warning(
                    "the run is now %d optimizer steps long, it was %d: the schedule is that of the new length",
                    steps,
                    self._restored.total_steps,
                )
            self._take_over()
            self._training.resume(trainer)
        elif trainer.ckpt_path is not None:
            raise ResumeMismatchError(f"it was not written by a run with strategy {type(self).__name__}")
        self.state.total_steps = steps
        if self._curve.rewarmup:
            self._rewarming = Rewarming(trainer.optimizers, self._rate(trainer))
        if not self.state.reached:
            rank_zero_info("\n".join(self._told(self._plan, self._curve, steps)))
        module.compression = self._record({name: layer.rank for name, layer in layers.items()})

    def _rate(self, trainer: pl.Trainer) -> Callable[[], float]:
        curve = self._curve
        assert curve is not None

        def rate() -> float:
            history = self.state.history
            return curve.rate(trainer.global_step + 1 - history[-1].step) if history else 1.0

        return rate

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lets layers hand out what is to be observed in this step."""
        del batch_idx
        if self.state.reached or self._curve is None:
            return
        step = trainer.global_step + 1
        layers = forms_in_training(as_compressible(pl_module).encoder)
        self._training.before_batch(layers, step, self._curve.next_action(step), gradient_scale(trainer, batch))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Observes the gradients: unscaled, averaged over processes, not yet clipped."""
        del trainer, optimizer
        if self.state.reached:
            return
        if not self._training.observe(forms_in_training(as_compressible(pl_module).encoder)):
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
        layers = forms_in_training(module.encoder)
        final = step >= self._curve.end
        budget = (
            float(self.state.budget) if final else self._curve.budget(step, self._plan.start_cost, self.state.budget)
        )
        if not any(gathered(trainer, self.sensitivity.steps)):
            if not final:
                return
            raise NonFiniteError("every gradient so far")
        self.latest_scores = self._training.reallocate(trainer, layers, self._plan, budget, final)
        self.state.reached = final
        worthless = [name for name, scores in self.latest_scores.items() if not bool(scores.any())]
        warn_of_worthless(self.state.worthless, worthless)
        self.state.worthless = worthless
        ranks = {name: layer.rank for name, layer in layers.items()}
        self.state.history.append(Reallocation(step, budget, self._plan.kept(ranks), ranks))
        module.compression = self._record(ranks)
        if final:
            self.sensitivity.release()
            kept, unit = self.state.history[-1].kept, self.cost.measure.unit
            rank_zero_info(f"the budget of {self.state.budget:,} {unit} is reached at step {step:,}: {kept:,} kept")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compacts the model: no step follows."""
        self._leave_optimizers()
        self._compact(trainer, pl_module)

    def _compact(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take_over()
        module = as_compressible(pl_module)
        ranks = {name: layer.rank for name, layer in forms_in_training(module.encoder).items()}
        if not ranks:
            return
        module.compression = self._record(ranks)
        self.finalize(module.encoder)
        # Whoever saves a checkpoint now saves the averaged weights, beside the layout of the model.
        match_ranks_(trainer, ranks)
        for model in averaged_models(trainer):
            self.finalize(as_compressible(model).encoder, module.encoder)

    def finalize(self, encoder: nn.Module, like: nn.Module | None = None) -> ModelLayout:
        """Turns the layers into the final form of exact rank, or into dense ones where that is allowed and smaller.

        Args:
            encoder: The model, or an averaged copy of it.
            like: For a copy, the model, finalised: parameters of both stand for the same things.

        Returns:
            The layout of the encoder after it.
        """
        ranks = {name: layer.rank for name, layer in forms_in_training(encoder).items()}
        compact_(encoder, self._plan.dense_layers(ranks), final_form(self.form), like)
        return read_layout(encoder)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Gives the compiler its settings back; see `conclude`."""
        self._leave_compiling()
        super().teardown(trainer, pl_module, stage)

    def conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes a run fail that has ended before the budget was reached; compacts one that was resumed at its end.

        Raises:
            BudgetNotReachedError: everything has been saved and reported; the model is larger than asked.
            NoTrainingStepError: there was no batch to train on.
        """
        if trainer.global_step == 0:
            super().conclude(trainer, pl_module)
        self._compact(trainer, pl_module)
        if self.state.capacities and not self.state.reached:
            told = (self._kept_so_far(), self.state.budget, trainer.global_step, self.state.total_steps)
            raise BudgetNotReachedError(*told, unit=self.cost.measure.unit)

    def _kept_so_far(self) -> int:
        return self.state.history[-1].kept if self.state.history else self._plan.start_cost

    def state_dict(self) -> dict[str, Any]:
        """The scores and where the run stands."""
        return {"ranks": self.state.to_dict(), "sensitivity": self.sensitivity.state_dict()}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lets a checkpoint of several processes hold what all of them have observed."""
        if trainer.world_size > 1 and not self.state.reached:
            self._training.before_checkpoint(trainer, self._plan, pl_module.device)
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores `state_dict`'s; whether it fits is looked at in `on_train_start`."""
        self._restored = RankState.from_dict(state_dict["ranks"])
        own = type(self.sensitivity).__name__
        if self._restored.sensitivity == own or not (self._restored.sensitivity or own == "KroneckerSensitivity"):
            self.sensitivity.load_state_dict(state_dict["sensitivity"])

    def options(self) -> dict[str, Any]:
        """What identifies the method in reports, as primitives."""
        return {
            **vars(self.budget),
            "schedule": dict(vars(self.schedule)),
            "sensitivity": self.sensitivity.options(),
            "floor": self.floor,
            "per_parameter": self.per_parameter,
            "start_ratio": self.start_ratio,
            "bounds": [dict(vars(bound)) for bound in self.bounds],
            "multiple_of": self.multiple_of,
            "allow_dense": self.allow_dense,
            "cost": self.cost.measure.options(),
            "form": self.form,
        }

    def _take_over(self) -> None:
        """Goes on from a restored state; a run that was resumed at its very end does not even start training."""
        if self._restored is not None:
            self.state, self._restored = self._restored, None

    def _record(self, ranks: Mapping[str, int]) -> CompressionRecord:
        return record_of(type(self).__name__, self.options(), self._plan, self.state, ranks)
