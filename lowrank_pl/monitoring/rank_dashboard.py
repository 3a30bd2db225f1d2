"""Ranks and errors of the factorised layers in TensorBoard."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from lowrank_pl.monitoring.rank_picture import rank_heatmap
from lowrank_pl.monitoring.report import layer_records, parameter_counts


class RankDashboard(pl.Callback):
    """Logs `rank/<layer>`, `error/<layer>`, `compression/keep_ratio` and a heat map, once per run."""

    def __init__(self) -> None:
        self._logged = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets an earlier run."""
        del trainer, pl_module
        self._logged = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Logs before the first step of a run, also of one that is resumed: every strategy has written its factors."""
        del batch, batch_idx
        if not self._logged:
            self._logged = True
            self.log_ranks(trainer, pl_module)

    @staticmethod
    def log_ranks(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs to every TensorBoard logger of the trainer; silent for a model without factorised layers."""
        if not hasattr(pl_module, "encoder") or not trainer.is_global_zero:
            return
        layers = layer_records(pl_module)
        if all(layer.kind == "dense" for layer in layers):
            return
        step = trainer.global_step
        counts = parameter_counts(pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                writer = logger.experiment
                for layer in layers:
                    writer.add_scalar(f"rank/{layer.name}", layer.rank, step)
                    if layer.error is not None:
                        writer.add_scalar(f"error/{layer.name}", layer.error, step)
                    if layer.weighted_error is not None:
                        writer.add_scalar(f"weighted_error/{layer.name}", layer.weighted_error, step)
                    for solver_step, loss in enumerate(layer.losses):
                        writer.add_scalar(f"solver_loss/{layer.name}", loss, solver_step)
                writer.add_scalar("compression/keep_ratio", counts["targeted_kept"] / counts["targeted_dense"], step)
                writer.add_figure("compression/ranks", rank_heatmap(layers), step)
