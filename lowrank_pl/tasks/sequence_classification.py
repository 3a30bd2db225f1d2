"""One label or one value per text or pair of texts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from lowrank_pl.contract import TargetKind
from lowrank_pl.strategies.labels import Uniform
from lowrank_pl.tasks.base import EncoderTask
from lowrank_pl.tasks.drawn_labels import drawn_classes, drawn_values

logger = logging.getLogger(__name__)


class SequenceClassification(EncoderTask):
    """Classification or regression of whole texts, as the data say (like Hugging Face's class of that name).

    Cross-entropy for classes, squared error for values. See `EncoderTask` for the arguments.
    """

    auto_class = AutoModelForSequenceClassification
    kinds: ClassVar[tuple[TargetKind, ...]] = ("classification", "regression")

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of logits `[b, c]`, or squared error of values `[b, 1]`."""
        if self._regression:
            return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="none")
        return F.cross_entropy(logits, labels, reduction="none")

    def imitation_loss(self, logits: Tensor, taught: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """The softened divergence of logits `[b, c]`, or the squared error of values `[b, 1]`."""
        if self._regression:
            return F.mse_loss(logits, taught)
        return super().imitation_loss(logits, taught, labels, temperature)

    def drawn_labels(self, outputs: Tensor, batch: Mapping[str, Tensor], uniform: Uniform) -> Tensor:
        """Classes drawn from the softmax of logits `[b, c]`, or values from N(predicted, ½); see `DrawsLabels`."""
        del batch
        draws = uniform(len(outputs))
        return drawn_values(outputs.squeeze(-1), draws) if self._regression else drawn_classes(outputs, draws)

    def predictions(self, logits: Tensor) -> Tensor:
        """Class ids `[b]`, or values `[b]`."""
        return logits.squeeze(-1) if self._regression else logits.argmax(-1)

    def metric_inputs(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits for classes, values for regression; the classes predicted are counted on the way."""
        if self._regression:
            return logits.squeeze(-1), labels.float()
        self._predicted += torch.bincount(logits.argmax(-1), minlength=len(self._predicted))
        return logits, labels

    def _start_metrics(self, stage: str) -> None:
        super()._start_metrics(stage)
        assert self.target is not None
        self._predicted = torch.zeros(len(self.target.label_names), dtype=torch.long, device=self.device)

    def _log_metrics(self, stage: str) -> None:
        super()._log_metrics(stage)
        if not self._regression:
            self._tell_collapse(stage)

    def _tell_collapse(self, stage: str) -> None:
        """Logs whether one class alone is predicted: F1 and accuracy can look fine then and mean nothing."""
        assert self.target is not None
        counts = self.trainer.strategy.reduce(self._predicted, reduce_op="sum")
        collapsed = int((counts > 0).sum()) == 1 and int(counts.sum()) > 1
        self._log_computed(f"{stage}/collapsed", float(collapsed))
        if collapsed and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            logger.warning(
                "%s: all %d samples are predicted as %r; scores of a collapsed model mean nothing",
                stage,
                int(counts.sum()),
                self.target.label_names[int(counts.argmax())],
            )

    @property
    def _regression(self) -> bool:
        return self.target is not None and self.target.kind == "regression"
