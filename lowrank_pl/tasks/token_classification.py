"""One tag per word."""

from __future__ import annotations

from typing import ClassVar

from transformers import AutoModelForTokenClassification

from lowrank_pl.contract import TargetKind
from lowrank_pl.tasks.per_token import PerTokenTask


class TokenClassification(PerTokenTask):
    """Tags such as BIO entities. See `EncoderTask` for the arguments."""

    auto_class = AutoModelForTokenClassification
    kinds: ClassVar[tuple[TargetKind, ...]] = ("token_classification",)
