"""Changes to a module tree: which layers, how they are exchanged, what a checkpoint must know about it."""

from lowrank_pl.surgery.convert import compact_, compact_state, densify_
from lowrank_pl.surgery.groups import keep_groups_, svd_layers
from lowrank_pl.surgery.layout import ModelLayout, compacted, conform_, read_layout
from lowrank_pl.surgery.record import CompressionRecord, LayerRecord
from lowrank_pl.surgery.swap import replace_module_, swapped
from lowrank_pl.surgery.targets import TargetSelector

__all__ = [
    "CompressionRecord",
    "LayerRecord",
    "ModelLayout",
    "TargetSelector",
    "compact_",
    "compact_state",
    "compacted",
    "conform_",
    "densify_",
    "keep_groups_",
    "read_layout",
    "replace_module_",
    "svd_layers",
    "swapped",
]
