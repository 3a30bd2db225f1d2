"""By what the gradient of one sample's own loss is multiplied before the layers see it."""

from __future__ import annotations

import lightning.pytorch as pl

from lowrank_pl.importance.batches import Batch, tensors_of


def gradient_scale(trainer: pl.Trainer, batch: Batch) -> float:
    """The scale of mixed precision over the number of samples, of whose losses a training step takes the mean.

    Of a mean over few samples, such as the last of an epoch, each sample's gradient is larger.

    Args:
        trainer: Of the run; in float16 its precision scales the loss.
        batch: Of the step. Its first tensor, `[b, …]`, tells the samples; others may have other lengths. Without
            tensors it counts as one sample.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    tensors = tensors_of(batch)
    return scale / max(1, len(tensors[0])) if tensors else scale
