"""Guessing masked tokens."""

from __future__ import annotations

from typing import ClassVar

from transformers import AutoModelForMaskedLM

from lowrank_pl.contract import TargetKind
from lowrank_pl.tasks.per_token import PerTokenTask


class MaskedLM(PerTokenTask):
    """Masked language modelling; the score is the perplexity of the masked tokens, lower is better.

    See `EncoderTask` for the arguments.
    """

    auto_class = AutoModelForMaskedLM
    kinds: ClassVar[tuple[TargetKind, ...]] = ("masked_lm",)
