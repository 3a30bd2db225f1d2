"""Guessing masked tokens."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from transformers import AutoModelForMaskedLM

from lowrank_pl.contract import TargetKind
from lowrank_pl.tasks.base import EncoderTask
from lowrank_pl.tasks.token_classification import mean_per_sample, mean_per_token, token_losses


class MaskedLM(EncoderTask):
    """Masked language modelling; the score is the perplexity of the masked tokens, lower is better.

    See `EncoderTask` for the arguments.
    """

    auto_class = AutoModelForMaskedLM
    kinds: ClassVar[tuple[TargetKind, ...]] = ("masked_lm",)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over each sample's masked tokens."""
        return mean_per_sample(token_losses(logits, labels), labels)

    def training_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over the batch's masked tokens."""
        return mean_per_token(token_losses(logits, labels), labels)

    def predictions(self, logits: Tensor) -> Tensor:
        """Token ids `[b, t]`."""
        return logits.argmax(-1)
