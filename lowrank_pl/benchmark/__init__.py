"""How fast a model really is: whole models against each other, and layers against their ranks."""

from lowrank_pl.benchmark.command import benchmark

__all__ = ["benchmark"]
