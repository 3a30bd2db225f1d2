"""Predicting the next token. b: samples, t: tokens, c: tokens of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from transformers import AutoModelForCausalLM

from lowrank_pl.contract import TargetKind
from lowrank_pl.strategies.labels import Uniform
from lowrank_pl.tasks.drawn_labels import drawn_classes
from lowrank_pl.tasks.per_token import IGNORED, PerTokenTask


class CausalLM(PerTokenTask):
    """Language modelling with a decoder; the score is the perplexity, lower is better.

    A label is the token at its own place, or -100 where none is to be predicted, as in transformers; it is compared
    with what the model predicts one place before it. The labels are shifted here, once, and never given to the model.

    Perplexity is `exp` of the negative log-likelihood of all predicted tokens over their number, whatever windows they
    are in. A sample's own loss, for importance, is the mean over its own predicted tokens, as in `MaskedLM`: in full
    windows, which all predict equally many, that is their sum up to one constant, which no method depends on.

    See `EncoderTask` for the arguments; `pretrained` is a decoder here.
    """

    auto_class = AutoModelForCausalLM
    kinds: ClassVar[tuple[TargetKind, ...]] = ("causal_lm",)

    def model_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """All of a batch but its `labels`. No cache: there is nothing to generate."""
        return {**super().model_inputs(batch), "use_cache": False}

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy `[b]` over each sample's predicted tokens."""
        return super().losses(logits, next_tokens(labels))

    def training_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over the batch's predicted tokens."""
        return super().training_loss(logits, next_tokens(labels))

    def imitation_loss(self, logits: Tensor, taught: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Mean softened divergence over the batch's predicted tokens, of logits `[b, t, c]`."""
        return super().imitation_loss(logits, taught, next_tokens(labels), temperature)

    def loss_weight(self, labels: Tensor) -> Tensor:
        """The predicted tokens: the logged loss is one per token, over unequal windows too."""
        return (next_tokens(labels) != IGNORED).sum()

    def metric_inputs(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[b, t, c]`, and the tokens `[b, t]` that follow."""
        return logits, next_tokens(labels)

    def drawn_labels(self, outputs: Tensor, batch: Mapping[str, Tensor], uniform: Uniform) -> Tensor:
        """Tokens drawn from the softmax of the logits one place before them; see `DrawsLabels`."""
        labelled = self.labelled_tokens(batch)[:, 1:]
        labels = torch.full(outputs.shape[:2], IGNORED, device=outputs.device)
        labels[:, 1:][labelled] = drawn_classes(outputs[:, :-1][labelled], uniform(int(labelled.sum())))
        return labels

    def predictions(self, logits: Tensor) -> Tensor:
        """Token ids `[b, t]`, each at the place that it is predicted for; -100 at the first, which nothing precedes."""
        return F.pad(logits[:, :-1].argmax(-1), (1, 0), value=IGNORED)

    def _start_metrics(self, stage: str) -> None:
        super()._start_metrics(stage)
        self._metrics[stage].add_metrics({"tokens": PredictedTokens(), "window": LongestWindow()})
        self._metrics[stage].to(self.device)


def next_tokens(labels: Tensor) -> Tensor:
    """For every place of labels `[b, t]` the label of the next one; -100 at the last place."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


class PredictedTokens(Metric):
    """How many tokens were predicted."""

    full_state_update = False
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds the tokens `[b, t]` of a batch that are not -100."""
        del preds
        self.count += (target != IGNORED).sum()

    def compute(self) -> Tensor:
        """As a floating-point number, which Lightning logs."""
        return self.count.float()


class LongestWindow(Metric):
    """Tokens of the longest window, without which a perplexity says little; padding behind the last does not count."""

    full_state_update = False
    longest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("longest", torch.tensor(0), dist_reduce_fx="max")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Looks at the tokens `[b, t]` that follow in a batch, -100 where none is predicted."""
        del preds
        # The last token of a window is the one that follows at the place before it.
        lengths = (target != IGNORED) * torch.arange(2, target.shape[1] + 2, device=target.device)
        self.longest = torch.maximum(self.longest, lengths.max())

    def compute(self) -> Tensor:
        """As a floating-point number, which Lightning logs."""
        return self.longest.float()
