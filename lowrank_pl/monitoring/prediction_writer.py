"""Predictions as a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lowrank_pl.tasks import EncoderTask

logger = logging.getLogger(__name__)


class PredictionWriter(BasePredictionWriter):
    """Writes `predictions.jsonl` into the run folder of `predict`: one line per sample, in the data's order.

    Each line has `index`, `prediction` (a label's name, a value, or a list of tags) and `logits`, the last only for
    one prediction per sample. Several processes write `predictions-<rank>.jsonl` each, with the samples' indices.
    """

    def __init__(self) -> None:
        super().__init__("epoch")

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Writes all batches of this process."""
        if not isinstance(pl_module, EncoderTask) or trainer.log_dir is None or getattr(trainer, "fast_dev_run", False):
            return
        name = "predictions.jsonl" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.jsonl"
        path = Path(trainer.log_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        indices = [index for batch in batch_indices[0] for index in batch] if batch_indices else []
        rows = [row for batch in predictions for row in self._rows(pl_module, batch)]
        with path.open("w", encoding="utf-8") as file:
            for index, row in zip(indices or range(len(rows)), rows, strict=True):
                file.write(json.dumps({"index": index, **row}, ensure_ascii=False) + "\n")
        logger.info("predictions: %s", path)

    @staticmethod
    def _rows(task: EncoderTask, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        names = task.target.label_names if task.target else ()

        def told(value: Any) -> Any:
            if isinstance(value, list):
                return [told(item) for item in value]
            return names[value] if names and isinstance(value, int) else value

        rows = [{"prediction": told(value)} for value in batch["prediction"].tolist()]
        if batch["prediction"].ndim == 1:
            rows = [row | {"logits": x} for row, x in zip(rows, batch["logits"].tolist(), strict=True)]
        return rows
