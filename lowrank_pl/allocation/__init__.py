"""Scores, shapes and a budget in; ranks out. Knows nothing of where scores come from."""

from lowrank_pl.allocation.uniform import Allocation, LayerOverride, uniform_ranks

__all__ = ["Allocation", "LayerOverride", "uniform_ranks"]
