"""How much a weight, input, output or singular group of a linear layer matters to the loss. Knows nothing of ranks."""

from lowrank_pl.importance.cache import FisherCache
from lowrank_pl.importance.fisher import Fisher, FisherKind, LayerFisher, empirical_fisher
from lowrank_pl.importance.sensitivity import FirstOrder, Groups, GroupSensitivity, Squared, Triplet

__all__ = [
    "FirstOrder",
    "Fisher",
    "FisherCache",
    "FisherKind",
    "GroupSensitivity",
    "Groups",
    "LayerFisher",
    "Squared",
    "Triplet",
    "empirical_fisher",
]
