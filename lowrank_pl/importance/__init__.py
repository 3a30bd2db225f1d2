"""How much each weight, input or output of a linear layer matters to the loss. Knows nothing of ranks."""

from lowrank_pl.importance.cache import FisherCache
from lowrank_pl.importance.fisher import Fisher, FisherKind, LayerFisher, empirical_fisher

__all__ = ["Fisher", "FisherCache", "FisherKind", "LayerFisher", "empirical_fisher"]
