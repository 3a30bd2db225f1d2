"""Writes a report at the end of fit and test."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lowrank_pl.checkpoint import saved_at_budget
from lowrank_pl.monitoring.rank_picture import save_rank_picture
from lowrank_pl.monitoring.report import build_report, layer_records, write_report
from lowrank_pl.monitoring.run_folder import run_folder
from lowrank_pl.tasks import EncoderTask, budget_score

logger = logging.getLogger(__name__)


class ReportWriter(pl.Callback):
    """Leaves `report.json`, `report.md` and `ranks.png` in the run folder of every `fit` and `test`.

    Nothing there is replaced: a second run in the same folder leaves `report-2.json`, `report-2.md` and `ranks-2.png`.

    Attributes:
        written: The last report, for people; on the first process.
    """

    def __init__(self) -> None:
        self.written: Path | None = None
        self._started = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Starts the clock."""
        del trainer, pl_module, stage
        self._started = time.monotonic()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports the last validation and the best checkpoint."""
        checkpoint = trainer.checkpoint_callback
        extra: dict[str, Any] = {"epochs": trainer.current_epoch, "steps": trainer.global_step}
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
            best = checkpoint.best_model_score
            extra["checkpoint"] = checkpoint.best_model_path
            extra["checkpoint_score"] = None if best is None else float(best)
            extra["checkpoint_monitor"] = checkpoint.monitor
            if isinstance(pl_module, EncoderTask) and pl_module.strategy.shrinks:
                extra["checkpoint_at_budget"] = saved_at_budget(checkpoint.best_model_path)
                if checkpoint.monitor == budget_score.KEY and not extra["checkpoint_at_budget"]:
                    extra["checkpoint_score"] = None
        self._write(trainer, pl_module, "fit", "val", extra)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports the test."""
        self._write(trainer, pl_module, "test", "test", {"checkpoint": trainer.ckpt_path})

    def _write(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, verb: str, split: str, extra: dict[str, Any]
    ) -> None:
        folder = run_folder(trainer)
        if not hasattr(pl_module, "encoder") or folder is None:
            return
        if trainer.is_global_zero:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            if not budget_score.is_score(metrics.get(budget_score.KEY, 0.0)):
                metrics[budget_score.KEY] = math.nan
            seconds = time.monotonic() - self._started
            report = build_report(pl_module, verb, split, metrics, seconds, **extra)
            path = write_report(report, folder)
            self.written = path.with_suffix(".md")
            save_rank_picture(layer_records(pl_module), path.with_name(path.stem.replace("report", "ranks") + ".png"))
            logger.info("report: %s", path)
