"""Scores of a validation or test epoch: the official metrics of the data, and the score of a model at its budget."""

from __future__ import annotations

from abc import ABC, abstractmethod

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from lowrank_pl.contract import TargetSpec
from lowrank_pl.core.precision import float64_device
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.strategies.run_length import optimizer_steps
from lowrank_pl.tasks import budget_score, finite_scores
from lowrank_pl.tasks.metrics import build_metrics, score
from lowrank_pl.tasks.scheduled import ScheduledModule


class ScoredModule(ScheduledModule, ABC):
    """A module that is scored by the metrics of its target; see `ScheduledModule` for the arguments.

    Attributes:
        target: What it predicts; `None` until it is known.
    """

    def __init__(self, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None, warmup: float) -> None:
        super().__init__(optimizer, scheduler, warmup)
        self.target: TargetSpec | None = None
        self._metrics: dict[str, MetricCollection] = {}
        self._losses: dict[str, MeanMetric] = {}
        self._not_finite: dict[str, Tensor] | None = None

    # What a subclass says.

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses `[b]` of a batch's samples, each as if it were alone."""

    def training_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The scalar that training minimises: the mean of `losses`."""
        return self.losses(logits, labels).mean()

    def loss_weight(self, labels: Tensor) -> Tensor | int:
        """How much a batch's `training_loss` counts in the loss of an epoch: by its number of samples."""
        return len(labels)

    def metric_inputs(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the metrics compare."""
        return logits, labels

    @property
    @abstractmethod
    def at_budget(self) -> bool:
        """Whether the model has the size that was asked for."""

    # Steps and epochs.

    # It looks at signatures, which `torch.compile(task)` cannot follow.
    log = torch.compiler.disable(pl.LightningModule.log)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to `val/loss` and the metrics."""
        del batch_idx
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to `test/loss` and the metrics."""
        del batch_idx
        self._evaluate("test", batch)

    def on_validation_epoch_start(self) -> None:
        """Starts fresh metrics."""
        self._start_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Starts fresh metrics."""
        self._start_metrics("test")

    def on_validation_epoch_end(self) -> None:
        """Logs `val/score` and every metric."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs `test/score` and every metric."""
        self._log_metrics("test")

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        logits, labels = self(batch).float(), batch["labels"]
        loss = self.training_loss(logits, labels)
        if self._not_finite is None and finite_scores.is_refused(self.trainer) and not bool(loss.isfinite()):
            self._not_finite = batch
            if self.trainer.world_size == 1:  # others would wait at the end of the epoch
                self._refuse_not_finite(stage)
        self._add(stage, logits, labels, loss)

    def _refuse_not_finite(self, stage: str) -> None:
        batch, self._not_finite = self._not_finite, None
        finite_scores.refuse_together(self, stage, batch)

    def add_to_scores(self, stage: str, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch to the loss and the metrics, whatever has computed its logits.

        Args:
            stage: `"val"` or `"test"`, whose epoch has started.
            logits: Of the batch, in float32.
            labels: Likewise.
        """
        self._add(stage, logits, labels, self.training_loss(logits, labels))

    def _add(self, stage: str, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        self._losses[stage].update(loss, self.loss_weight(labels))
        self._metrics[stage].update(*self.metric_inputs(logits, labels))

    def _start_metrics(self, stage: str) -> None:
        if self.target is None:
            raise MissingArgumentError(
                "what the labels mean", "Pass a datamodule that has a `target`, such as every class of lowrank_pl.data."
            )
        exact = float64_device(self.device) == self.device
        self._metrics[stage] = build_metrics(self.target, exact).to(self.device)
        # Not self.log with sync_dist: it averages the counts of unequal shards as integers.
        self._losses[stage] = MeanMetric().to(self.device)

    def scores(self, stage: str) -> dict[str, Tensor]:
        """`loss`, every metric and `score` of the batches that an epoch has seen so far, over all processes."""
        assert self.target is not None
        values: dict[str, Tensor] = self._metrics[stage].compute()
        return {"loss": self._losses[stage].compute(), **values, "score": score(self.target, values)}

    def _log_metrics(self, stage: str) -> None:
        if finite_scores.is_refused(self.trainer):
            self._refuse_not_finite(stage)
        found = self.scores(stage)
        for name, value in found.items():
            self._log_computed(f"{stage}/{name}", value, prog_bar=name in ("loss", "score"))
        if stage == "val":
            self._log_score_at_budget(found["score"])

    def _log_computed(self, name: str, value: Tensor | float, prog_bar: bool = False, logger: bool = True) -> None:
        """Logs what torchmetrics has reduced over processes already: the same number on each of them."""
        # Lightning warns of values that it does not reduce. The maximum of equal numbers is that number exactly.
        self.log(name, value, prog_bar=prog_bar, logger=logger, sync_dist=True, reduce_fx="max")

    def _log_score_at_budget(self, found: Tensor) -> None:
        """Under a shrinking budget the best score is always an early, large model's: this is one to select by."""
        assert self.target is not None
        if not self.is_fitting:
            none = torch.full_like(found, budget_score.no_score(self.target))
            self._log_computed(budget_score.KEY, found if self.at_budget else none)
            return
        if not self.at_budget:
            left = optimizer_steps(self.trainer) - self.trainer.global_step
            found = torch.full_like(found, budget_score.stand_in(self.target, left))
        elif not self.trainer.sanity_checking:
            for writer in self.loggers:
                writer.log_metrics({budget_score.KEY: float(found)}, self.trainer.global_step)
        # What stands for a score before there is one is for callbacks: in a logger's chart it would hide the scores.
        self._log_computed(budget_score.KEY, found, logger=False)

    @property
    def is_fitting(self) -> bool:
        """Whether the verb under way is `fit`, its validation included."""
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
