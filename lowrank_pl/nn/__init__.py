"""Layers that replace `nn.Linear`. Needs torch alone."""

from lowrank_pl.nn.low_rank_linear import LowRankLinear

__all__ = ["LowRankLinear"]
