"""What is said of a run that a signal has stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from lowrank_pl.errors.run import RunStoppedError
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.strategies.finished_blocks import FinishedBlocks


def stopped(trainer: pl.Trainer, model: pl.LightningModule, verb: str, number: int, started: float) -> RunStoppedError:
    """The error for a verb that a signal has stopped.

    Args:
        trainer: That of the run.
        model: What it ran.
        verb: Such as `"fit"`.
        number: The signal.
        started: When the run was started, in seconds since 1970: checkpoints that are older are those of other runs.
    """
    progress = getattr(trainer, "progress", None)
    if verb == "compress" and progress is not None and FinishedBlocks(progress).measured() is not None:
        return RunStoppedError(verb, number, kept=str(progress))
    if verb != "fit" or not trainer.optimizers:
        return RunStoppedError(verb, number)
    record = as_compressible(model).compression
    told: list[str] = []
    if record is not None and not getattr(model, "at_budget", True):
        told = [note for note in record.notes if "budget" in note]
    return RunStoppedError(verb, number, trainer.global_step, _last_checkpoint(trainer, started), told)


def _last_checkpoint(trainer: pl.Trainer, started: float) -> str | None:
    """The newest file that the run's callbacks have written, or else what the run was resumed from."""
    callbacks: list[Any] = getattr(trainer, "callbacks")  # noqa: B009, set without a type
    names = ("best_model_path", "last_model_path", "ckpt_path")
    paths = [str(getattr(c, name, "") or "") for c in callbacks if isinstance(c, Checkpoint) for name in names]
    written = {path: Path(path).stat().st_mtime for path in paths if path and Path(path).is_file()}
    own = [path for path, time in written.items() if time >= started]
    resumed = None if trainer.ckpt_path is None else str(trainer.ckpt_path)
    return max(own, key=lambda path: written[path]) if own else resumed
