"""Scores, shapes and a budget in; ranks out. Knows nothing of where scores come from."""

from lowrank_pl.allocation.allocator import Allocator, RankRequest, Uniform
from lowrank_pl.allocation.budget import Budget
from lowrank_pl.allocation.global_ranks import Global, RankChoice, best_ranks
from lowrank_pl.allocation.measure import Flops, Latency, Measure, Parameters
from lowrank_pl.allocation.ranking import Cost, RankBounds, globally_ranked, rounded
from lowrank_pl.allocation.schedule import CubicCurve, CubicSchedule
from lowrank_pl.allocation.uniform import Allocation, LayerOverride, uniform_ranks

__all__ = [
    "Allocation",
    "Allocator",
    "Budget",
    "Cost",
    "CubicCurve",
    "CubicSchedule",
    "Flops",
    "Global",
    "Latency",
    "LayerOverride",
    "Measure",
    "Parameters",
    "RankBounds",
    "RankChoice",
    "RankRequest",
    "Uniform",
    "best_ranks",
    "globally_ranked",
    "rounded",
    "uniform_ranks",
]
