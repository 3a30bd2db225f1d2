"""What tasks with one label per token share. b: samples, t: tokens, c: classes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_pl.core.distillation import softened_divergence
from lowrank_pl.strategies.labels import Uniform
from lowrank_pl.tasks.base import EncoderTask
from lowrank_pl.tasks.drawn_labels import drawn_classes

IGNORED = -100


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropies `[b, t]` of logits `[b, t, c]`; 0 where the label is -100."""
    flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return flat.view(labels.shape)


def mean_per_sample(losses: Tensor, labels: Tensor) -> Tensor:
    """Means `[b]` over each sample's labelled tokens; 0 for a sample without any."""
    return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def mean_per_token(losses: Tensor, labels: Tensor) -> Tensor:
    """The mean over all labelled tokens of a batch."""
    return losses.sum() / (labels != IGNORED).sum().clamp(min=1)


class PerTokenTask(EncoderTask):
    """Cross-entropy over labelled tokens.

    Training minimises the mean over the batch's labelled tokens; a sample's own loss (for importance) is the mean
    over its own.
    """

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over each sample's labelled tokens."""
        return mean_per_sample(token_losses(logits, labels), labels)

    def training_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over the batch's labelled tokens."""
        return mean_per_token(token_losses(logits, labels), labels)

    def loss_weight(self, labels: Tensor) -> Tensor:
        """The labelled tokens: the logged loss of an epoch is one per token, however they are divided into batches."""
        return (labels != IGNORED).sum()

    def imitation_loss(self, logits: Tensor, taught: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Mean softened divergence over the batch's labelled tokens, of logits `[b, t, c]`."""
        labelled = labels != IGNORED
        return softened_divergence(logits[labelled], taught[labelled], temperature).sum() / labelled.sum().clamp(min=1)

    def drawn_labels(self, outputs: Tensor, batch: Mapping[str, Tensor], uniform: Uniform) -> Tensor:
        """Classes drawn from the softmax of logits `[b, t, c]` for `labelled_tokens`, else -100; see `DrawsLabels`."""
        labelled = self.labelled_tokens(batch)
        labels = torch.full(outputs.shape[:2], IGNORED, device=outputs.device)
        labels[labelled] = drawn_classes(outputs[labelled], uniform(int(labelled.sum())))
        return labels

    def labelled_tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Which tokens `[b, t]` get a label: those that have one, or, without any labels, all that are no padding."""
        if "labels" in batch:
            return batch["labels"] != IGNORED
        return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()

    def predictions(self, logits: Tensor) -> Tensor:
        """Class ids `[b, t]`."""
        return logits.argmax(-1)
