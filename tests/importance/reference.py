"""The empirical Fisher information as it is defined: one sample at a time, autograd, square, mean."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_pl.importance.fisher import Batch, PerSampleLoss


def classification_loss(model: nn.Module) -> PerSampleLoss:
    """Cross entropy per sample of a sequence classifier."""

    def losses(batch: Batch) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return F.cross_entropy(model(**inputs).logits.float(), batch["labels"], reduction="none")

    return losses


def token_loss(model: nn.Module) -> PerSampleLoss:
    """Mean cross entropy over the labelled tokens of each sample."""

    def losses(batch: Batch) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        each = F.cross_entropy(model(**inputs).logits.mT, batch["labels"], reduction="none")
        means: Tensor = each.sum(1) / (batch["labels"] != -100).sum(1)
        return means

    return losses


def single_samples(batch: Batch) -> list[dict[str, Tensor]]:
    """The samples of a padded batch, alone and without padding."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return [
        {key: v[i : i + 1, :length] if v.ndim == 2 else v[i : i + 1] for key, v in batch.items()}
        for i, length in enumerate(lengths)
    ]


def reference_fisher(
    layers: Mapping[str, nn.Module], samples: list[dict[str, Tensor]], loss: PerSampleLoss
) -> dict[str, Tensor]:
    """`F [m, n]` of each layer, in float64. The model is expected in eval mode, its weights requiring gradients."""
    weights = {name: layer.get_parameter("weight") for name, layer in layers.items()}
    sums = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    for sample in samples:
        gradients = torch.autograd.grad(loss(sample).sum(), list(weights.values()), allow_unused=True)
        for name, gradient in zip(layers, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.double() ** 2
    return {name: total / len(samples) for name, total in sums.items()}


def assert_same(given: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Largest deviation relative to the largest entry."""
    assert given.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 0, "nothing to compare"
    assert float((given.double() - expected.double()).abs().max()) <= tolerance * scale
