"""Lightning's Trainer with the extra verbs `compress` and `inspect`."""

from lowrank_pl.trainer.trainer import LowRankTrainer

__all__ = ["LowRankTrainer"]
