"""What this package writes into checkpoints and config.json beside what Lightning and transformers do.

Primitives and tensors only: every file loads with `weights_only=True`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from lowrank_pl.checkpoint.saved import ENCODER_PREFIX, SavedModel
from lowrank_pl.contract import TargetKind, TargetSpec
from lowrank_pl.errors.checkpoint import NotACheckpointError
from lowrank_pl.surgery import CompressionRecord, ModelLayout, current_names

LAYOUT_KEY = "lowrank_layout"
TASK_KEY = "lowrank_task"
BASE_KEY = "lowrank_base"
INT8_KEY = "lowrank_int8"

_BEFORE_IT_WAS_TOLD: dict[TargetKind, str] = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
}
"""The Auto class of checkpoints without its name: of releases that knew these three, and of tasks whose class
transformers does not have. For reading alone: what is written tells the task's own."""


def describe(
    config: PreTrainedConfig,
    layout: ModelLayout,
    target: TargetSpec,
    compression: CompressionRecord | None,
    tokenizer: str | None = None,
    auto_class: str | None = None,
    generation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The entries a checkpoint gets beside its `state_dict`.

    Args:
        config: Of the model with its head.
        layout: Of the model.
        target: What it predicts.
        compression: How it was compressed, where it was.
        tokenizer: Where its tokenizer is.
        auto_class: Name of the class of transformers that makes it.
        generation: Its generation config, where it generates.
    """
    return {
        LAYOUT_KEY: layout.to_dict(),
        TASK_KEY: {
            "config": config.to_json_string(use_diff=False),
            "target": target.to_dict(),
            "compression": None if compression is None else compression.to_dict(),
            "tokenizer": tokenizer,
            "auto_class": auto_class,
            "generation": None if generation is None else json.dumps(generation),
        },
    }


def from_checkpoint(checkpoint: Mapping[str, Any], source: str) -> SavedModel:
    """Reads the entries of `describe` and the encoder's weights out of a Lightning checkpoint.

    Raises:
        NotACheckpointError: it was not written by a task of this package.
        LayoutVersionError: it was written by an incompatible release.
    """
    if TASK_KEY not in checkpoint or LAYOUT_KEY not in checkpoint or "state_dict" not in checkpoint:
        raise NotACheckpointError(source, f"it has no {TASK_KEY!r} entry")
    task = checkpoint[TASK_KEY]
    state = {
        name.removeprefix(ENCODER_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(ENCODER_PREFIX)
    }
    config = config_of(json.loads(task["config"]))
    target = TargetSpec.from_dict(task["target"])
    return SavedModel(
        source,
        config,
        ModelLayout.from_dict(checkpoint[LAYOUT_KEY]),
        current_names(state, checkpoint[LAYOUT_KEY]),
        target,
        CompressionRecord.from_dict(task["compression"]) if task["compression"] else None,
        tokenizer=task.get("tokenizer") or getattr(config, "_name_or_path", None) or None,
        auto_class=task.get("auto_class") or _BEFORE_IT_WAS_TOLD[target.kind],
        generation=json.loads(task.get("generation") or "null"),
        step=checkpoint.get("global_step"),
    )


def auto_class_in(fields: Mapping[str, Any]) -> str | None:
    """The Auto class by which transformers loads a folder with a module file, as its config.json tells."""
    places = fields.get("auto_map")
    names = places if isinstance(places, dict) else {}
    return next((name for name in names if name.startswith("AutoModel")), None)


def config_of(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration that the fields of a config.json tell, `model_type` among them."""
    rest = {name: _with_all_floats(value) for name, value in fields.items()}
    config: PreTrainedConfig = AutoConfig.for_model(rest.pop("model_type"), **rest)
    return config


def _with_all_floats(value: Any) -> Any:
    """A value of a config.json, with floats that JSON has not: transformers writes `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_all_floats(inner) for key, inner in value.items()}
    return [_with_all_floats(inner) for inner in value] if isinstance(value, list) else value
