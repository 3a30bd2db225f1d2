"""Models on disk: what is written beside the weights, reading it back, and rebuilding a model from it."""

from lowrank_pl.checkpoint.building import auto_class_of, auto_classes_making, build, name_in_transformers, outline
from lowrank_pl.checkpoint.entries import LAYOUT_KEY, describe, from_checkpoint
from lowrank_pl.checkpoint.factorised import factorised_class
from lowrank_pl.checkpoint.folders import CHECKPOINT_NAME, ONNX_NAME
from lowrank_pl.checkpoint.int8 import Scheme, check_torchao, is_quantized, quantize_
from lowrank_pl.checkpoint.loading import from_pretrained, load_model
from lowrank_pl.checkpoint.reading import (
    check_loadable,
    check_readable,
    check_resumable,
    read_saved_model,
    saved_at_budget,
    saved_config,
    saved_entry,
    saved_layout,
)
from lowrank_pl.checkpoint.saved import SavedModel, check_state

__all__ = [
    "CHECKPOINT_NAME",
    "LAYOUT_KEY",
    "ONNX_NAME",
    "SavedModel",
    "Scheme",
    "auto_class_of",
    "auto_classes_making",
    "build",
    "check_loadable",
    "check_readable",
    "check_resumable",
    "check_state",
    "check_torchao",
    "describe",
    "factorised_class",
    "from_checkpoint",
    "from_pretrained",
    "is_quantized",
    "load_model",
    "name_in_transformers",
    "outline",
    "quantize_",
    "read_saved_model",
    "saved_at_budget",
    "saved_config",
    "saved_entry",
    "saved_layout",
]
