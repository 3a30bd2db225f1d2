"""How well decoders do on tasks of lm-evaluation-harness, in its own arithmetic."""

from lowrank_pl.evaluation.command import evaluate

__all__ = ["evaluate"]
