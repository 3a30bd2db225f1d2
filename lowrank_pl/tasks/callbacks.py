"""Whether the callbacks of a run fit the strategy and the score: refusals and warnings before any long work."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lowrank_pl.contract import TargetSpec
from lowrank_pl.errors.run import MonitorModeError, UnsupportedCallbackError
from lowrank_pl.strategies import CompressionStrategy
from lowrank_pl.strategies.processes import shards
from lowrank_pl.tasks.metrics import lower_is_better

logger = logging.getLogger(__name__)


def check_callbacks(trainer: pl.Trainer, strategy: CompressionStrategy, target: TargetSpec | None) -> None:
    """Raises an error for callbacks that would spoil a run, and warns of those that may not do what one would think.

    Raises:
        MonitorModeError: a callback would keep, or wait for, the worst model.
        UnsupportedCallbackError: a callback exchanges parameters for others, or copies a model that is divided.
    """
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks")  # noqa: B009, set without a type
    for callback in callbacks:
        if isinstance(callback, ModelPruning):
            raise UnsupportedCallbackError(
                "ModelPruning",
                "it exchanges parameters for masked ones under other names, which checkpoints of this package, made of "
                "the architecture and its factorised layers, cannot describe",
                "Remove it; fewer parameters come from model.init_args.strategy.",
            )
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)) and shards(trainer.strategy):
            raise UnsupportedCallbackError(
                type(callback).__name__,
                "it copies the whole model, of which ModelParallelStrategy leaves each process a part",
                "Remove it, or set trainer.strategy to 'ddp'.",
            )
        if isinstance(callback, (EarlyStopping, ModelCheckpoint)):
            _tell_of_monitor(callback, strategy)
    check_monitor_modes(trainer, target)


def check_monitor_modes(trainer: pl.Trainer, target: TargetSpec | None) -> None:
    """Raises an error for a callback that would keep, or wait for, the worst model: some scores are better when lower.

    Raises:
        MonitorModeError: naming the callback.
    """
    if target is None:
        return
    wanted = "min" if lower_is_better(target) else "max"
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks")  # noqa: B009, set without a type
    for callback in callbacks:
        if isinstance(callback, (EarlyStopping, ModelCheckpoint)):
            name, monitor = type(callback).__name__, callback.monitor or ""
            if monitor.endswith(("/score", "/score_at_budget")) and callback.mode != wanted:
                raise MonitorModeError(name, monitor, callback.mode, wanted, target.name)


def _tell_of_monitor(callback: EarlyStopping | ModelCheckpoint, strategy: CompressionStrategy) -> None:
    monitor = callback.monitor or ""
    if not strategy.shrinks or not monitor:
        return
    method = type(strategy).__name__
    if isinstance(callback, EarlyStopping):
        if not monitor.endswith("_at_budget"):
            logger.warning(
                "EarlyStopping monitors %r and may end the run before %s has reached its budget, which makes it fail: "
                "monitor 'val/score_at_budget', which improves until then",
                *(monitor, method),
            )
        elif callback.divergence_threshold is not None:
            logger.warning(
                "EarlyStopping's divergence_threshold will end the run at once: until %s has reached its budget %r is "
                "worse than every score",
                *(method, monitor),
            )
    elif callback.save_top_k != 0 and not monitor.endswith("_at_budget"):
        logger.warning(
            "a ModelCheckpoint monitors %r and may keep a model from before %s has reached its budget, larger than "
            "asked: monitor 'val/score_at_budget' to keep the best one at the budget",
            *(monitor, method),
        )
