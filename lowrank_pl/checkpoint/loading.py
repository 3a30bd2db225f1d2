"""Whole models by name, ready to run. No code of a folder is run, and neither Lightning nor a task is needed."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import AutoModel, PreTrainedModel

from lowrank_pl.checkpoint.building import build
from lowrank_pl.checkpoint.entries import BASE_KEY, LAYOUT_KEY
from lowrank_pl.checkpoint.factorised import config_fields, factorised_class
from lowrank_pl.checkpoint.folders import CHECKPOINT_NAME
from lowrank_pl.checkpoint.reading import read_saved_model
from lowrank_pl.errors.checkpoint import CheckpointMismatchError, NotACheckpointError
from lowrank_pl.hub import load_config, load_pretrained, resolve_pretrained


def from_pretrained(folder: str) -> PreTrainedModel:
    """Loads a model that `export` or `save_pretrained` has written, in eval mode; no code of the folder is run.

    Args:
        folder: With config.json and safetensors.

    Returns:
        The model with its factorised layers; its `save_pretrained` writes the same folder again.

    Raises:
        NotACheckpointError: there is no readable model, or not one of this package.
        DamagedWeightsError: the weights are not those that `SHA256SUMS` in the folder tells of.
        LayoutVersionError: an incompatible release has written it.
        CheckpointMismatchError: config.json and the weights disagree.
    """
    saved = read_saved_model(folder, "from_pretrained")
    name = getattr(saved.config, BASE_KEY, None)
    if saved.dense_folder is not None or name is None:
        problem = f"config.json names no {BASE_KEY!r}: a dense model loads by transformers"
        raise NotACheckpointError(folder, problem, "from_pretrained")
    base = getattr(transformers, str(name), None)
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise CheckpointMismatchError(folder, f"transformers {transformers.__version__} has no class {name!r}")
    model = build(saved, factorised_class(base, saved.auto_class), as_saved=True)
    model.config.update(config_fields(model))
    return model


def load_model(path: str, argument: str = "init_from") -> PreTrainedModel:
    """A model from wherever it lies, in eval mode.

    Args:
        path: A checkpoint, the output folder of `compress`, an exported folder, or a dense model as `pretrained` names
            it: a folder, a hub id or `pkg://…`.
        argument: By which the user named it, for messages.

    Raises:
        NotACheckpointError, CheckpointMismatchError, ModelFolderError, HubUnreachableError, PackageModelError: there is
            no usable model.
    """
    location = Path(path).expanduser()
    if location.is_file() or (location / CHECKPOINT_NAME).is_file():
        return build(read_saved_model(path, argument))
    config = load_config(path)
    if hasattr(config, LAYOUT_KEY):
        return from_pretrained(resolve_pretrained(path))
    names = config.architectures or []
    kind = getattr(transformers, names[0], AutoModel) if names else AutoModel
    model, _ = load_pretrained(kind, path)
    model.eval()
    return model
