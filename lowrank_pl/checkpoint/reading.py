"""Reading models back: Lightning checkpoints and what `compress` leaves; folders in `folders.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from lowrank_pl.checkpoint.entries import LAYOUT_KEY, TASK_KEY, config_of, from_checkpoint
from lowrank_pl.checkpoint.folders import CHECKPOINT_NAME, folder_fields, read_folder
from lowrank_pl.checkpoint.saved import SavedModel
from lowrank_pl.errors.checkpoint import NotACheckpointError
from lowrank_pl.surgery import CompressionRecord, ModelLayout


def read_saved_model(path: str, argument: str = "init_from") -> SavedModel:
    """Reads a Lightning checkpoint, the output folder of `compress`, or a Hugging Face folder.

    Args:
        path: Where it is.
        argument: By which the user named it, for messages.

    Raises:
        NotACheckpointError: nothing readable there.
        DamagedWeightsError: the weights of a folder are not those that its `SHA256SUMS` tells of.
        LayoutVersionError: written by an incompatible release.
    """
    location = Path(path).expanduser()
    if location.is_dir() and (location / CHECKPOINT_NAME).exists():
        location = location / CHECKPOINT_NAME
    if location.is_dir():
        return read_folder(location, argument)
    return from_checkpoint(_load(path, location, argument), path).compacted()


def saved_layout(path: str) -> ModelLayout:
    """The layout in a checkpoint, as it was in training.

    Raises:
        NotACheckpointError, LayoutVersionError: see `from_checkpoint`.
    """
    checkpoint = _load(path, Path(path).expanduser(), "--ckpt_path", look=True)
    return ModelLayout.from_dict(checkpoint[LAYOUT_KEY])


def saved_entry(path: str, key: str) -> Any:
    """What somebody else has put into a checkpoint under a key of its own; `None` without it.

    Raises:
        NotACheckpointError: see `from_checkpoint`.
    """
    return _load(path, Path(path).expanduser(), "--ckpt_path", look=True).get(key)


def saved_config(path: str) -> PreTrainedConfig | None:
    """The configuration of what `read_saved_model` reads, weights left alone; `None` where it cannot be read."""
    location = Path(path).expanduser()
    if (location / CHECKPOINT_NAME).is_file():
        location = location / CHECKPOINT_NAME
    try:
        if location.is_dir():
            return config_of(json.loads((location / "config.json").read_text(encoding="utf-8")))
        task = torch.load(location, weights_only=True, mmap=True, map_location="cpu")[TASK_KEY]
        return config_of(json.loads(task["config"]))
    except Exception:  # see `_load`
        return None


def saved_at_budget(path: str) -> bool | None:
    """Whether the model of a Lightning checkpoint has the size that was asked for; `None` where that cannot be read."""
    try:
        task = torch.load(path, weights_only=True, mmap=True, map_location="cpu")[TASK_KEY]
    except Exception:  # see `_load`
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


def check_readable(path: str) -> None:
    """Raises an error for what cannot be given as `init_from`; the weights of a folder are left alone.

    Raises:
        NotACheckpointError: nothing readable there.
    """
    location = Path(path).expanduser()
    if location.is_dir() and not (location / CHECKPOINT_NAME).exists():
        folder_fields(location, "init_from")
    else:
        _load(path, location / CHECKPOINT_NAME if location.is_dir() else location, "init_from")


def _load(path: str, location: Path, argument: str, look: bool = False) -> dict[str, Any]:
    """A checkpoint; for a look at something else than tensors these stay on the disk."""
    if not location.is_file():
        problem = "it is a folder" if location.exists() else "no such file or folder"
        if (location / CHECKPOINT_NAME).is_file():
            problem += f"; the checkpoint in it is {str(Path(path) / CHECKPOINT_NAME)!r}"
        raise NotACheckpointError(path, problem, argument)
    try:
        checkpoint: dict[str, Any] = torch.load(location, map_location="cpu", weights_only=True, mmap=look)
    except Exception as error:  # bytes of any other file are instructions to pickle, which fails in as many ways
        told = (str(error) or type(error).__name__).splitlines()[0]
        if told.startswith("Weights only"):  # torch goes on with advice that runs what is in the file
            told = told.partition(".")[0]
        raise NotACheckpointError(path, f"not a readable checkpoint ({told})", argument) from error
    if not isinstance(checkpoint, dict) or not {TASK_KEY, LAYOUT_KEY, "state_dict"} <= checkpoint.keys():
        raise NotACheckpointError(path, f"it has no {TASK_KEY!r} entry", argument)
    return checkpoint
