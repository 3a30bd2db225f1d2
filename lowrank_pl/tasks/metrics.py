"""Official metrics of a task, as torchmetrics that reduce over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.text import Perplexity

from lowrank_pl.contract import MetricName, TargetSpec


def build_metrics(target: TargetSpec) -> MetricCollection:
    """The metrics of a target, under their names."""
    return MetricCollection(
        {name: _build(name, target) for name in target.metrics},
        compute_groups=False,
    )


def score(target: TargetSpec, values: dict[str, Tensor]) -> Tensor:
    """The one number of a target: the metric it names, or the mean of all."""
    if target.score is not None:
        return values[target.score]
    return torch.stack([values[name].float() for name in target.metrics]).mean()


def lower_is_better(target: TargetSpec) -> bool:
    """Whether a lower score is a better one."""
    return (target.score or target.metrics[0]) == "perplexity"


def _build(name: MetricName, target: TargetSpec) -> Metric:
    classes = max(len(target.label_names), 2)
    match name:
        case "accuracy":
            return MulticlassAccuracy(num_classes=classes, average="micro")
        case "f1":
            # GLUE's F1 is that of the positive class.
            return BinaryLogitsF1() if classes == 2 else MulticlassF1Score(num_classes=classes, average="macro")
        case "matthews":
            return MulticlassMatthewsCorrCoef(num_classes=classes)
        case "pearson":
            return PearsonCorrCoef()
        case "spearman":
            return SpearmanCorrCoef()
        case "entity_f1":
            return EntityF1(target.label_names)
        case "perplexity":
            return Perplexity(ignore_index=-100)


class BinaryLogitsF1(BinaryF1Score):
    """F1 of class 1 from two logits `[b, 2]`."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch."""
        super().update(preds.argmax(-1), target)


class EntityF1(Metric):
    """Micro F1 over entities: a predicted entity counts if its type and both boundaries are right.

    Args:
        label_names: BIO tags in the order of their ids.

    References:
        Tjong Kim Sang and De Meulder, Introduction to the CoNLL-2003 shared task, 2003; entities are read off
        the tags by seqeval.
    """

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    predicted: Tensor
    true: Tensor

    def __init__(self, label_names: tuple[str, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.label_names = label_names
        for name in ("correct", "predicted", "true"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds logits `[b, t, c]` against labels `[b, t]`, -100 where no label is."""
        # Brings scikit-learn, which takes a second to load and only tagging needs.
        from seqeval.metrics.sequence_labeling import get_entities

        for row, labels in zip(preds.argmax(-1).tolist(), target.tolist(), strict=True):
            kept = [(p, y) for p, y in zip(row, labels, strict=True) if y != -100]
            predicted = set(get_entities([self.label_names[p] for p, _ in kept]))
            true = set(get_entities([self.label_names[y] for _, y in kept]))
            self.correct += len(predicted & true)
            self.predicted += len(predicted)
            self.true += len(true)

    def compute(self) -> Tensor:
        """`2 · correct / (predicted + true)`; 0 where there is no entity at all."""
        return 2 * self.correct / (self.predicted + self.true).clamp(min=1)
