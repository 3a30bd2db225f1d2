"""Writes a report at the end of fit and test, also where a signal ends it."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lowrank_pl.checkpoint import saved_at_budget
from lowrank_pl.monitoring.rank_picture import save_rank_picture
from lowrank_pl.monitoring.report import build_report, layer_records, write_report
from lowrank_pl.monitoring.run_folder import run_folder
from lowrank_pl.monitoring.stopping_signal import stopping_signal
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.tasks import EncoderTask, budget_score

logger = logging.getLogger(__name__)


class ReportWriter(pl.Callback):
    """Leaves `report.json`, `report.md` and `ranks.png` in the run folder of every `fit` and `test`.

    Nothing there is replaced: a second run in the same folder leaves `report-2.json`, `report-2.md` and `ranks-2.png`.
    A `fit` that SIGTERM or an interrupt stops leaves them as well, with a note that tells the step. Checkpoints hold
    the last scores, for a run that is resumed where it had come to its end.

    Attributes:
        written: The last report, for people; on the first process.
    """

    def __init__(self) -> None:
        self.written: Path | None = None
        self._started = 0.0
        self._folder: Path | None = None
        self._scores: dict[str, float] = {}
        self._scored_at: int | None = None
        self._scored_before = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Starts the clock, and forgets an earlier run: what a checkpoint brings comes after this."""
        del trainer, pl_module, stage
        self._started = time.monotonic()
        self._scores, self._scored_at, self._scored_before = {}, None, False

    def state_dict(self) -> dict[str, Any]:
        """The scores of the last validation, and of which step they are."""
        return {"scores": dict(self._scores), "scored_at": self._scored_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the scores of the run that wrote a checkpoint."""
        self._scores, self._scored_at = dict(state_dict["scores"]), state_dict["scored_at"]
        self._scored_before = self._scored_at is not None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks for the folder while all processes are there: of a run that is stopped some may be gone."""
        del pl_module
        self._folder = run_folder(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remembers the scores, and of which step they are."""
        del pl_module
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._scores, self._scored_at, self._scored_before = _metrics(trainer), trainer.global_step, False

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports the last validation and the best checkpoint."""
        metrics, note, step = {**self._scores, **_metrics(trainer)}, "", trainer.global_step
        if self._scored_at is None:
            note = "no validation ran, so there is no score: see trainer.val_check_interval and .limit_val_batches"
        elif self._scored_before and self._scored_at == step:
            note = f"no step was left to train: the score is that of the run that wrote {str(trainer.ckpt_path)!r}"
        elif self._scored_at != step:
            note = f"the score is that of step {self._scored_at:,}: no validation followed the last, {step:,}"
        extra = self._of_training(trainer, pl_module)
        if note:
            record = as_compressible(pl_module).compression
            extra["notes"] = [*(record.notes if record is not None else ()), note]
        self._write(trainer, pl_module, "fit", "val", extra, metrics)
        if note and self.written is not None:
            logger.warning("%s", note)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Reports a training that a signal has stopped, with the scores of its last validation."""
        stopped = stopping_signal(exception)
        if stopped is None or trainer.state.fn != TrainerFn.FITTING or not trainer.optimizers:
            return
        record = as_compressible(pl_module).compression
        told = f"the run was stopped by {stopped.name} after optimizer step {trainer.global_step:,}"
        extra = self._of_training(trainer, pl_module)
        extra |= {"stopped_by": stopped.name, "notes": [*(record.notes if record is not None else ()), told]}
        self._write(trainer, pl_module, "fit", "val", extra, self._scores)

    def _of_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What a report of `fit` has beyond those of other verbs."""
        checkpoint = trainer.checkpoint_callback
        extra: dict[str, Any] = {
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "score_step": self._scored_at,
        }
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
            best = checkpoint.best_model_score
            extra["checkpoint"] = checkpoint.best_model_path
            extra["checkpoint_score"] = None if best is None else float(best)
            extra["checkpoint_monitor"] = checkpoint.monitor
            if isinstance(pl_module, EncoderTask) and pl_module.strategy.shrinks:
                extra["checkpoint_at_budget"] = saved_at_budget(checkpoint.best_model_path)
                if checkpoint.monitor == budget_score.KEY and not extra["checkpoint_at_budget"]:
                    extra["checkpoint_score"] = None
        return extra

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports the test."""
        self._folder = run_folder(trainer)
        self._write(trainer, pl_module, "test", "test", {"checkpoint": trainer.ckpt_path}, _metrics(trainer))

    def _write(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        verb: str,
        split: str,
        extra: dict[str, Any],
        metrics: dict[str, float],
    ) -> None:
        if not hasattr(pl_module, "encoder") or self._folder is None or not trainer.is_global_zero:
            return
        seconds = time.monotonic() - self._started
        report = build_report(pl_module, verb, split, metrics, seconds, **extra)
        path = write_report(report, self._folder)
        self.written = path.with_suffix(".md")
        save_rank_picture(layer_records(pl_module), path.with_name(path.stem.replace("report", "ranks") + ".png"))
        logger.info("report: %s", path)


def _metrics(trainer: pl.Trainer) -> dict[str, float]:
    """What was logged last; what stands for the score of a model above its budget is none."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if not budget_score.is_score(metrics.get(budget_score.KEY, 0.0)):
        metrics[budget_score.KEY] = math.nan
    return metrics
