"""Guessing masked tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from transformers import AutoModelForMaskedLM

from lowrank_pl.contract import TargetKind
from lowrank_pl.errors.labels import LabelsError
from lowrank_pl.tasks.per_token import PerTokenTask


class MaskedLM(PerTokenTask):
    """Masked language modelling; the score is the perplexity of the masked tokens, lower is better.

    See `EncoderTask` for the arguments.
    """

    auto_class = AutoModelForMaskedLM
    kinds: ClassVar[tuple[TargetKind, ...]] = ("masked_lm",)

    def labelled_tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Which tokens `[b, t]` were masked.

        Raises:
            LabelsError: there are no labels, which alone tell it.
        """
        if "labels" not in batch:
            raise LabelsError(type(self).__name__, "only labels tell which tokens were masked, and there are none")
        return super().labelled_tokens(batch)
