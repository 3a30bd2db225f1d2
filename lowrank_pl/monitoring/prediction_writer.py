"""Predictions as a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lowrank_pl.tasks import EncoderTask
from lowrank_pl.tasks.per_token import IGNORED

logger = logging.getLogger(__name__)


class PredictionWriter(BasePredictionWriter):
    """Writes `predictions.jsonl` into the run folder of `predict`: one line per sample, in the data's order.

    Each line has `index` and `prediction`. One prediction per sample is a label's name or a value, and comes with its
    `logits`. One per token is a list over the tokens that have a label: a tag for each word (words cut off at
    `max_length` have none), or a token id for each masked token; a batch without labels gives a list over all tokens,
    padding included. Several processes write `predictions-<rank>.jsonl` each, with the samples' indices.
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
            return names[value] if names and isinstance(value, int) else value

        predictions = batch["prediction"]
        if predictions.ndim == 1:
            pairs = zip(predictions.tolist(), batch["logits"].tolist(), strict=True)
            return [{"prediction": told(value), "logits": logits} for value, logits in pairs]
        labelled = batch["labels"] != IGNORED if "labels" in batch else torch.ones_like(predictions, dtype=torch.bool)
        return [
            {"prediction": [told(value) for value in row[kept].tolist()]}
            for row, kept in zip(predictions, labelled, strict=True)
        ]
