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

from lowrank_pl.contract import TellsTexts
from lowrank_pl.monitoring.run_folder import run_folder
from lowrank_pl.tasks import EncoderTask
from lowrank_pl.tasks.per_token import IGNORED

logger = logging.getLogger(__name__)


class PredictionWriter(BasePredictionWriter):
    """Writes `predictions.jsonl` into the run folder of `predict`: one line per sample, in the data's order.

    Each line has the sample's `index`, what the data provide for it (`text`, `text_pair` or `words`, and the `row` of a
    file of new texts), and its `prediction`:

    * a label's name, with its `probability`, the `probabilities` of all labels by name, and the `logits` in order;
    * a value;
    * one prediction per token as a list over the tokens that have a label: a tag for each word (words cut off at
      `max_length` have none), or a token id for each masked token; a batch without labels gives a list over all tokens,
      padding included.

    Several processes write `predictions-<rank>.jsonl` each, with the samples' indices.

    Attributes:
        written: This process's last file.
    """

    def __init__(self) -> None:
        super().__init__("epoch")
        self.written: Path | None = None

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Writes all batches of this process."""
        folder = run_folder(trainer)
        if not isinstance(pl_module, EncoderTask) or getattr(trainer, "fast_dev_run", False):
            return
        if folder is None:
            logger.warning("predictions are not written: give a trainer.logger, or a trainer.default_root_dir")
            return
        name = "predictions.jsonl" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.jsonl"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        indices = [index for batch in batch_indices[0] for index in batch] if batch_indices else []
        rows = [row for batch in predictions for row in self._rows(pl_module, batch)]
        datamodule = getattr(trainer, "datamodule", None)
        told = datamodule.predicted_rows() if isinstance(datamodule, TellsTexts) else None
        with path.open("w", encoding="utf-8") as file:
            for index, row in zip(indices or range(len(rows)), rows, strict=True):
                sample = {} if told is None else told[index]
                file.write(json.dumps({"index": index, **sample, **row}, ensure_ascii=False) + "\n")
        self.written = path
        logger.info("predictions: %s", path)

    @staticmethod
    def _rows(task: EncoderTask, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        names = task.target.label_names if task.target else ()

        def told(value: Any) -> Any:
            return names[value] if names and isinstance(value, int) else value

        predictions = batch["prediction"]
        if predictions.ndim == 1 and predictions.is_floating_point():
            return [{"prediction": value} for value in predictions.tolist()]
        if predictions.ndim == 1:
            shares = batch["logits"].double().softmax(-1).tolist()
            return [
                {
                    "prediction": told(value),
                    "probability": share[value],
                    "probabilities": {str(told(id_)): p for id_, p in enumerate(share)},
                    "logits": logits,
                }
                for value, share, logits in zip(predictions.tolist(), shares, batch["logits"].tolist(), strict=True)
            ]
        labelled = batch["labels"] != IGNORED if "labels" in batch else torch.ones_like(predictions, dtype=torch.bool)
        return [
            {"prediction": [told(value) for value in row[kept].tolist()]}
            for row, kept in zip(predictions, labelled, strict=True)
        ]
