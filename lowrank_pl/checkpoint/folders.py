"""Hugging Face folders, dense or factorised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers import __version__ as transformers_version

from lowrank_pl.checkpoint.entries import INT8_KEY, LAYOUT_KEY, auto_class_in, config_of
from lowrank_pl.checkpoint.int8 import assembled, problem_with
from lowrank_pl.checkpoint.saved import SavedModel
from lowrank_pl.errors.checkpoint import NotACheckpointError
from lowrank_pl.files.checksums import verify_checksums
from lowrank_pl.files.weight_files import int8_files, weight_files
from lowrank_pl.surgery import ModelLayout, current_names

CHECKPOINT_NAME = "model.ckpt"
ONNX_NAME = "model.onnx"
_GENERATION = "generation_config.json"


def read_folder(folder: Path, argument: str) -> SavedModel:
    """Reads a Hugging Face folder with safetensors; a `lowrank_layout` in its config.json tells factorised layers.

    Args:
        folder: Where it is.
        argument: By which the user named it, for messages.

    Raises:
        NotACheckpointError, DamagedWeightsError, LayoutVersionError: see `read_saved_model`.
        CheckpointMismatchError: the index of the weights and the shards disagree, or config.json and numbers in int8.
        MissingPackagesError: it is in int8 and torchao is not installed.
    """
    fields = folder_fields(folder, argument)
    told = fields.pop(LAYOUT_KEY, None)
    layout = ModelLayout.from_dict(told) if told is not None else None
    int8 = fields.pop(INT8_KEY, None)
    if int8 is not None and (problem := problem_with(int8)):
        raise NotACheckpointError(str(folder), problem, argument)
    files = weight_files(folder, argument) if int8 is None else int8_files(folder, argument)
    verify_checksums(folder, files.names)
    files.check_index()
    tokenizer = str(folder.absolute())
    if layout is None:
        return SavedModel(
            str(folder), config_of(fields), ModelLayout({}), {}, dense_folder=str(folder), tokenizer=tokenizer
        )
    state = current_names(files.read(), told)
    if int8 is not None:
        state = assembled(state, int8, str(folder))
    made_by, scheme = auto_class_in(fields), None if int8 is None else int8["scheme"]
    return SavedModel(
        str(folder),
        config_of(fields),
        layout,
        state,
        tokenizer=tokenizer,
        auto_class=made_by,
        scheme=scheme,
        generation=_generation_config(folder),
    )


def folder_fields(folder: Path, argument: str) -> dict[str, Any]:
    """What config.json of a Hugging Face folder tells, weights left alone.

    Raises:
        NotACheckpointError: nothing that can be read, or no model that torch runs.
    """
    config_file = folder / "config.json"
    if not config_file.exists() or (folder / ONNX_NAME).exists():
        problem = f"it has neither {CHECKPOINT_NAME} nor config.json with safetensors"
        if (folder / ONNX_NAME).exists():
            problem = f"{ONNX_NAME} is for onnxruntime alone; export the checkpoint once more with --format factorised"
        raise NotACheckpointError(str(folder), problem, argument)
    try:
        fields = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NotACheckpointError(str(folder), f"config.json is damaged ({error})", argument) from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise NotACheckpointError(str(folder), "config.json has no model_type", argument)
    if fields["model_type"] not in CONFIG_MAPPING:
        problem = f"transformers {transformers_version} knows no model_type {fields['model_type']!r}"
        raise NotACheckpointError(str(folder), problem, argument)
    return fields


def _generation_config(folder: Path) -> dict[str, Any] | None:
    """How the model generates, where the folder tells."""
    file = folder / _GENERATION
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
