"""Layers that replace `nn.Linear`. Needs torch alone."""

from lowrank_pl.nn.low_rank_linear import LowRankLinear
from lowrank_pl.nn.svd_linear import SVDLinear

__all__ = ["LowRankLinear", "SVDLinear"]
