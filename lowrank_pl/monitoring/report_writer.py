"""Writes a report at the end of fit and test."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lowrank_pl.monitoring.rank_picture import save_rank_picture
from lowrank_pl.monitoring.report import build_report, layer_records, write_report
from lowrank_pl.tasks import EncoderTask

logger = logging.getLogger(__name__)


class ReportWriter(pl.Callback):
    """Leaves `report.json`, `report.md` and a picture of the ranks in the run folder of every `fit` and `test`."""

    def __init__(self) -> None:
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
        self._write(trainer, pl_module, "fit", "val", extra)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports the test."""
        self._write(trainer, pl_module, "test", "test", {"checkpoint": trainer.ckpt_path})

    def _write(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, verb: str, split: str, extra: dict[str, Any]
    ) -> None:
        folder = trainer.log_dir
        if not isinstance(pl_module, EncoderTask) or getattr(trainer, "fast_dev_run", False) or folder is None:
            return
        if trainer.is_global_zero:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            seconds = time.monotonic() - self._started
            report = build_report(pl_module, verb, split, metrics, seconds, **extra)
            path = write_report(report, Path(folder))
            save_rank_picture(layer_records(pl_module), Path(folder) / "ranks.png")
            logger.info("report: %s", path)
