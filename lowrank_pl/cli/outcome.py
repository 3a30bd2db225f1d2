"""Where a run has left its files, told at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lowrank_pl.monitoring import PredictionWriter, ReportWriter


def outcome(trainer: pl.Trainer) -> list[str]:
    """Lines with the report, the checkpoints and the predictions of a run, as far as it has left any.

    Args:
        trainer: After `fit`, `test` or `predict`.

    Returns:
        Lines of the form `best: PATH`; empty on every process but the first.
    """
    if not trainer.is_global_zero:
        return []
    callbacks: list[Any] = getattr(trainer, "callbacks")  # noqa: B009, set without a type
    found: list[tuple[str, str]] = []
    for callback in callbacks:
        if isinstance(callback, (ReportWriter, PredictionWriter)) and callback.written is not None:
            found.append(("report" if isinstance(callback, ReportWriter) else "predictions", str(callback.written)))
        elif isinstance(callback, ModelCheckpoint) and trainer.state.fn == "fit":
            found += _checkpoints(callback)
    width = max((len(name) for name, _ in found), default=0) + 2
    return [f"{name + ':':{width}}{_relative(path)}" for name, path in found]


def _checkpoints(callback: ModelCheckpoint) -> list[tuple[str, str]]:
    best, score = callback.best_model_path, callback.best_model_score
    if not best:
        return []
    if callback.monitor is None:
        return [("checkpoint", best)]
    return [("best", best if score is None else f"{best} ({callback.monitor} {float(score):.4f})")]


def _relative(path: str) -> str:
    """Shorter below the working folder, and good for the next command there."""
    here = f"{Path.cwd()}/"
    return path.removeprefix(here)
