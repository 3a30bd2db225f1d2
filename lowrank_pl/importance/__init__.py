"""How much a weight, input, output or singular group of a linear layer matters to the loss. Knows nothing of ranks."""

from lowrank_pl.importance.cache import ImportanceCache
from lowrank_pl.importance.fisher import Fisher, FisherKind, LayerFisher, empirical_fisher
from lowrank_pl.importance.identity import identity, settings, values
from lowrank_pl.importance.importance import Importance, LayerImportance, Measured, memory_groups
from lowrank_pl.importance.kinds import FisherSums, FullFisher, Nothing
from lowrank_pl.importance.kronecker_sensitivity import KroneckerSensitivity
from lowrank_pl.importance.rises import LayerRises, SecondOrderRise
from lowrank_pl.importance.second_moments import Extent, LayerMoments, SecondMoments
from lowrank_pl.importance.sensitivity import FirstOrder, Groups, GroupSensitivity, Sensitivity, Squared, Triplet

__all__ = [
    "Extent",
    "FirstOrder",
    "Fisher",
    "FisherKind",
    "FisherSums",
    "FullFisher",
    "GroupSensitivity",
    "Groups",
    "Importance",
    "ImportanceCache",
    "KroneckerSensitivity",
    "LayerFisher",
    "LayerImportance",
    "LayerMoments",
    "LayerRises",
    "Measured",
    "Nothing",
    "SecondMoments",
    "SecondOrderRise",
    "Sensitivity",
    "Squared",
    "Triplet",
    "empirical_fisher",
    "identity",
    "memory_groups",
    "settings",
    "values",
]
