"""Every exception of the package; each composes its own message from what it is given."""

from lowrank_pl.errors.base import LowRankError

__all__ = ["LowRankError"]
