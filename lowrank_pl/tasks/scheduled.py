"""Optimizer and learning-rate schedule of a module, and what tuners change of them before the first step."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import LambdaLR

from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.strategies.run_length import optimizer_steps
from lowrank_pl.tasks import optimization

logger = logging.getLogger(__name__)


class ScheduledModule(pl.LightningModule):
    """A module that makes its optimizer and a schedule over the length of the run.

    Args:
        optimizer: Makes the optimizer from parameter groups.
        scheduler: Makes the scheduler; `None` for linear warm-up and decay.
        warmup: Share of all steps that the default scheduler warms up for, `0 <= warmup < 1`.
    """

    def __init__(self, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None, warmup: float) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise RangeError("warmup", warmup, "0 <= warmup < 1, the share of all steps")
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self._warmup = warmup
        self._scheduled_steps: int | None = None  # of the default schedule
        self._found_lr = False
        self._configured: list[dict[str, Any]] = []

    def check_optimizer(self) -> None:
        """Raises `OptimizerArgumentsError` where the optimizer rejects its arguments; needs no encoder."""
        optimization.try_optimizer(self._make_optimizer)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all trainable parameters and a scheduler, by default stepped with it.

        Raises:
            MissingArgumentError: the default scheduler does not know the length of the run, or `ReduceLROnPlateau` not
                what it looks at.
        """
        optimizer = optimization.make_optimizer(self._make_optimizer, optimization.decay_groups(self))
        if isinstance(self.trainer.precision_plugin, MixedPrecision):
            optimization.leave_unscaling_(optimizer)
        if self._make_scheduler is not None:
            scheduler: Any = self._make_scheduler(optimizer)
        else:
            self._scheduled_steps = optimizer_steps(self.trainer)
            scheduler = optimization.linear_warmup_decay(optimizer, self._scheduled_steps, self._warmup)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # as every scheduler does but ReduceLROnPlateau
        self._found_lr = False
        self._configured = optimization.settings(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": optimization.when_stepped(scheduler)}

    @property
    def lr(self) -> float | None:
        """The learning rate that the schedule scales; `LearningRateFinder` sets it. `None` outside a run."""
        optimizers = self.trainer.optimizers if self._trainer is not None else []
        return optimizers[0].param_groups[0].get("initial_lr") if optimizers else None

    @lr.setter
    def lr(self, rate: float) -> None:
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        optimization.set_learning_rate_(self.trainer.optimizers, schedulers, rate)
        self._configured = optimization.settings(self.trainer.optimizers[0])
        self._found_lr = True

    def _follow_tuners(self) -> None:
        """Makes the schedule fit what tuners have changed after it was made: the batch size, the learning rate."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        steps = None if self._scheduled_steps is None else optimizer_steps(self.trainer)
        if steps is not None and steps != self._scheduled_steps:
            self._scheduled_steps = steps
            for scheduler in schedulers:
                if isinstance(scheduler, LambdaLR):
                    optimization.reschedule_(scheduler, steps, self._warmup)
            optimization.restart_(schedulers)
        elif self._found_lr:
            optimization.restart_(schedulers)
        self._found_lr = False

    def on_train_start(self) -> None:
        """Follows tuners, and warns which settings a resumed run's optimizer state has replaced."""
        self._follow_tuners()
        if self.trainer.ckpt_path is not None:
            for optimizer in self.trainer.optimizers:
                for message in optimization.overridden(self._configured, optimizer):
                    logger.warning("resuming: %s; for new settings start a new run with init_from", message)
