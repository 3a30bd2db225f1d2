"""Changes to a module tree: which layers, how they are exchanged, what a checkpoint must know about it."""

from lowrank_pl.surgery.convert import densify_
from lowrank_pl.surgery.layout import ModelLayout, conform_, read_layout
from lowrank_pl.surgery.record import CompressionRecord, LayerRecord
from lowrank_pl.surgery.swap import replace_module_, swapped
from lowrank_pl.surgery.targets import TargetSelector

__all__ = [
    "CompressionRecord",
    "LayerRecord",
    "ModelLayout",
    "TargetSelector",
    "conform_",
    "densify_",
    "read_layout",
    "replace_module_",
    "swapped",
]
