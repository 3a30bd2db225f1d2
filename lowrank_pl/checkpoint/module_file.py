"""The Python file beside an exported model's weights, by which it loads where this package is not installed."""

from __future__ import annotations

from pathlib import Path

MODULE = "modeling_lowrank"
_TEMPLATE = Path(__file__).with_name("modeling_template.py")
_BASE = "from transformers import PreTrainedModel as Base\n"
_NAME = "LowRankModel"


def class_name(base: str) -> str:
    """What the factorised class is called: `LowRank` and its parent's name."""
    return f"LowRank{base}"


def module_text(base: str) -> str:
    """The file's content for a parent class of transformers, e.g. `"BertForSequenceClassification"`."""
    text = _TEMPLATE.read_text(encoding="utf-8")
    assert text.count(_BASE) == 1
    return text.replace(_BASE, f"from transformers import {base} as Base\n").replace(_NAME, class_name(base))
