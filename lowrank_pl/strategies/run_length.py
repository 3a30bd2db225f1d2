"""How many optimizer steps a run has."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler

from lowrank_pl.errors.arguments import MissingArgumentError


def optimizer_steps(trainer: pl.Trainer) -> int:
    """The optimizer steps of the whole run, if nothing ends it early.

    Lightning's own estimate knows the accumulation of one epoch alone, and is `-1` for a stream without a length.

    Args:
        trainer: Of a run that has its data.

    Raises:
        MissingArgumentError: nobody knows it.
    """
    if trainer.limit_train_batches == 0:  # of which Lightning tells no length either
        return 0
    estimated = trainer.estimated_stepping_batches
    if estimated == math.inf or estimated < 0:
        remedy = "Set trainer.max_epochs, for data that have a length, or trainer.max_steps: schedules span the run."
        raise MissingArgumentError("the length of the run", remedy)
    callbacks: list[Callback] = getattr(trainer, "callbacks")  # noqa: B009, set without a type
    accumulation = next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if accumulation is None or epochs is None or epochs < 0 or math.isinf(batches):
        return int(estimated)
    steps = sum(math.ceil(batches / accumulation.get_accumulate_grad_batches(epoch)) for epoch in range(max(epochs, 1)))
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)
