"""Changes to a module tree: which layers, how they are exchanged, what a checkpoint must know about it."""

from lowrank_pl.surgery.convert import compact_, compact_state, densify_
from lowrank_pl.surgery.groups import keep_groups_, svd_layers
from lowrank_pl.surgery.layout import ModelLayout, conform_, read_layout
from lowrank_pl.surgery.record import CompressionRecord, CostRecord, LayerRecord
from lowrank_pl.surgery.reform import ChangeOfBasis, follow_, reform_
from lowrank_pl.surgery.swap import Exchange, replace_module_
from lowrank_pl.surgery.targets import TargetSelector
from lowrank_pl.surgery.version_1 import current_names
from lowrank_pl.surgery.vocabulary import find_vocabulary, heads_tied_to, tie_head_, tied_heads, untie_head_

__all__ = [
    "ChangeOfBasis",
    "CompressionRecord",
    "CostRecord",
    "Exchange",
    "LayerRecord",
    "ModelLayout",
    "TargetSelector",
    "compact_",
    "compact_state",
    "conform_",
    "current_names",
    "densify_",
    "find_vocabulary",
    "follow_",
    "heads_tied_to",
    "keep_groups_",
    "read_layout",
    "reform_",
    "replace_module_",
    "svd_layers",
    "tie_head_",
    "tied_heads",
    "untie_head_",
]
