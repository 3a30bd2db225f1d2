"""`val/score_at_budget`: the score of models that have the size that was asked for, and what stands for it before.

Callbacks that monitor it want a finite number in every validation, `EarlyStopping` an improving one. So before the
budget is reached it is a number worse than every score, and better from validation to validation.
"""

from __future__ import annotations

import math

from lowrank_pl.contract import TargetSpec
from lowrank_pl.tasks.metrics import lower_is_better

KEY = "val/score_at_budget"
_BELOW_ALL = -2.0  # scores that are better when higher are from -1 (correlations) or 0 to 1
_ABOVE_ALL = 1e30  # perplexity has no upper end


def stand_in(target: TargetSpec, steps_left: float) -> float:
    """What is logged for a model above its budget during training.

    Args:
        target: Tells whether scores are better when lower.
        steps_left: Optimizer steps until the end of the run, `>= 0`; values improve by more than any score could.

    Returns:
        `-2 - steps_left`, or `(1 + steps_left) · 1e30` where lower is better; finite.
    """
    left = min(max(steps_left, 0.0), 1e7)
    return (1 + left) * _ABOVE_ALL if lower_is_better(target) else _BELOW_ALL - left


def no_score(target: TargetSpec) -> float:
    """What is logged for a model above its budget outside training: an infinitely bad score."""
    return math.inf if lower_is_better(target) else -math.inf


def is_score(value: float) -> bool:
    """Whether a value of `val/score_at_budget` is the score of a model at its budget."""
    return math.isfinite(value) and _BELOW_ALL < value < _ABOVE_ALL
