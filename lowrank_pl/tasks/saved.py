"""Models on disk: what a checkpoint stores beside the weights, and reading one back.

Primitives and tensors only: every file loads with `weights_only=True`.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers import __version__ as transformers_version

from lowrank_pl.contract import TargetSpec
from lowrank_pl.errors.model import CheckpointMismatchError, NotACheckpointError
from lowrank_pl.files.checksums import verify_checksums
from lowrank_pl.files.weight_files import weight_files
from lowrank_pl.surgery import CompressionRecord, ModelLayout, compact_state, conform_, current_names

CHECKPOINT_NAME = "model.ckpt"
ONNX_NAME = "model.onnx"
LAYOUT_KEY = "lowrank_layout"
TASK_KEY = "lowrank_task"
_ENCODER_PREFIX = "encoder."


@dataclass(frozen=True)
class SavedModel:
    """A model as it lies on disk.

    Attributes:
        source: Where it came from, for messages.
        config: The Hugging Face configuration, head included.
        layout: Which layers are factorised.
        state: Parameters and buffers of the encoder with its head.
        target: What it predicts, where the file contains it.
        compression: How it was compressed, where it was and the file contains it.
        tokenizer: Where its tokenizer is, as in `resolve_pretrained`, where the file contains it.
        dense_folder: A Hugging Face folder whose weights are still to be read, by its own loader; `state` is empty.
    """

    source: str
    config: PreTrainedConfig
    layout: ModelLayout
    state: dict[str, Tensor]
    target: TargetSpec | None = None
    compression: CompressionRecord | None = None
    dense_folder: str | None = None
    tokenizer: str | None = None

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes that the head distinguishes, in its order; empty for a single output."""
        if self.target is not None:
            return self.target.label_names
        labels = {int(index): name for index, name in (self.config.id2label or {}).items()}
        return tuple(labels[index] for index in sorted(labels)) if len(labels) > 1 else ()

    def compacted(self) -> SavedModel:
        """The same with layers in a form of training brought to the form that is deployed."""
        records = self.compression.layers if self.compression is not None else ()
        dense = [layer.name for layer in records if layer.kind == "dense"]
        state, layout = compact_state(self.state, self.layout, dense, self.source)
        return self if layout == self.layout else replace(self, layout=layout, state=state)

    def replace_in(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A task's state dict with these entries as those of its encoder."""
        others = {name: tensor for name, tensor in state.items() if not name.startswith(_ENCODER_PREFIX)}
        return others | {f"{_ENCODER_PREFIX}{name}": tensor for name, tensor in self.state.items()}

    def load_into_(self, encoder: nn.Module) -> None:
        """Gives an encoder this model's shapes and values.

        Raises:
            CheckpointMismatchError: any key is missing or unexpected or has another shape; the encoder's values
                are then untouched.
        """
        conform_(encoder, self.layout, self.source)
        state = {**self.state, **_tied(encoder, self.state)}
        check_state(encoder.state_dict(), state, self.source)
        encoder.load_state_dict(state)


def _tied(encoder: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values for names that a file leaves out because the model ties them to a name that it has."""
    names: dict[int, list[str]] = {}
    for name, parameter in encoder.state_dict(keep_vars=True).items():
        names.setdefault(id(parameter), []).append(name)
    found = {}
    for group in names.values():
        present = [name for name in group if name in state]
        if present:
            found.update({name: state[present[0]] for name in group if name not in state})
    return found


def check_state(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raises `CheckpointMismatchError` unless keys and shapes agree exactly."""
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointMismatchError.keys(source, missing, unexpected)
    for name, tensor in own.items():
        if tensor.shape != given[name].shape:
            problem = f"{name!r} is {list(given[name].shape)} there and {list(tensor.shape)} here"
            raise CheckpointMismatchError(source, problem)


def describe(
    config: PreTrainedConfig,
    layout: ModelLayout,
    target: TargetSpec,
    compression: CompressionRecord | None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """The entries a checkpoint gets beside its `state_dict`."""
    return {
        LAYOUT_KEY: layout.to_dict(),
        TASK_KEY: {
            "config": config.to_json_string(use_diff=False),
            "target": target.to_dict(),
            "compression": None if compression is None else compression.to_dict(),
            "tokenizer": tokenizer,
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
        name.removeprefix(_ENCODER_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(_ENCODER_PREFIX)
    }
    config = _config(json.loads(task["config"]))
    return SavedModel(
        source,
        config,
        ModelLayout.from_dict(checkpoint[LAYOUT_KEY]),
        current_names(state, checkpoint[LAYOUT_KEY]),
        TargetSpec.from_dict(task["target"]),
        CompressionRecord.from_dict(task["compression"]) if task["compression"] else None,
        tokenizer=task.get("tokenizer") or getattr(config, "_name_or_path", None) or None,
    )


def read_saved_model(path: str, argument: str = "init_from") -> SavedModel:
    """Reads a Lightning checkpoint, the output folder of `compress`, or a Hugging Face folder.

    Args:
        path: Where it is.
        argument: By which the user named it, for messages.

    Raises:
        NotACheckpointError: nothing readable there.
        DamagedWeightsError: the weights of a folder are not those that its `SHA256SUMS` lists.
        LayoutVersionError: written by an incompatible release.
    """
    location = Path(path).expanduser()
    if location.is_dir() and (location / CHECKPOINT_NAME).exists():
        location = location / CHECKPOINT_NAME
    if location.is_dir():
        return _from_folder(location, argument)
    return from_checkpoint(_load(path, location, argument), path).compacted()


def saved_layout(path: str) -> ModelLayout:
    """The layout in a checkpoint, as it was in training.

    Raises:
        NotACheckpointError, LayoutVersionError: see `from_checkpoint`.
    """
    checkpoint = _load(path, Path(path).expanduser(), "--ckpt_path")
    return ModelLayout.from_dict(checkpoint[LAYOUT_KEY])


def saved_at_budget(path: str) -> bool | None:
    """Whether the model of a Lightning checkpoint has the size that was asked for; `None` where that cannot be read."""
    try:
        task = torch.load(path, weights_only=True, mmap=True, map_location="cpu")[TASK_KEY]
    except (OSError, RuntimeError, pickle.UnpicklingError, KeyError):
        return None
    return CompressionRecord.from_dict(task["compression"]).at_budget if task["compression"] else None


def check_resumable(path: str) -> None:
    """Raises an error for what cannot be given as `--ckpt_path` to `fit`, before anything else is loaded.

    Raises:
        NotACheckpointError: it is no checkpoint of this package, or holds weights alone.
    """
    checkpoint = _load(path, Path(path).expanduser(), "--ckpt_path")
    if "optimizer_states" not in checkpoint:
        raise NotACheckpointError(path, "it holds weights alone; start a new run with init_from", "--ckpt_path")


def check_loadable(path: str) -> None:
    """Raises an error for what cannot be given as `--ckpt_path` to the other verbs; see `check_resumable`."""
    _load(path, Path(path).expanduser(), "--ckpt_path")


def _load(path: str, location: Path, argument: str) -> dict[str, Any]:
    if not location.is_file():
        problem = "it is a folder" if location.exists() else "no such file or folder"
        if (location / CHECKPOINT_NAME).is_file():
            problem += f"; the checkpoint in it is {str(Path(path) / CHECKPOINT_NAME)!r}"
        raise NotACheckpointError(path, problem, argument)
    try:
        checkpoint: dict[str, Any] = torch.load(location, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise NotACheckpointError(
            path, f"not a readable checkpoint ({str(error).splitlines()[0]})", argument
        ) from error
    if not isinstance(checkpoint, dict) or not {TASK_KEY, LAYOUT_KEY, "state_dict"} <= checkpoint.keys():
        raise NotACheckpointError(path, f"it has no {TASK_KEY!r} entry", argument)
    return checkpoint


def _from_folder(folder: Path, argument: str) -> SavedModel:
    """A Hugging Face folder with safetensors; a `lowrank_layout` in its config.json tells factorised layers."""
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
    told = fields.pop(LAYOUT_KEY, None)
    layout = ModelLayout.from_dict(told) if told is not None else None
    files = weight_files(folder, argument)
    verify_checksums(folder, files.names)
    files.check_index()
    tokenizer = str(folder.absolute())
    if layout is None:
        return SavedModel(
            str(folder), _config(fields), ModelLayout({}), {}, dense_folder=str(folder), tokenizer=tokenizer
        )
    state = current_names(files.read(), told)
    return SavedModel(str(folder), _config(fields), layout, state, tokenizer=tokenizer)


def _config(fields: dict[str, Any]) -> PreTrainedConfig:
    fields = dict(fields)
    config: PreTrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return config
