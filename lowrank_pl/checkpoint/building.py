"""A model as it lies on disk, turned into one that runs: the one place where this is done."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from lowrank_pl.checkpoint.as_saved import take_dtypes_, take_generation_config_
from lowrank_pl.checkpoint.saved import SavedModel
from lowrank_pl.errors.checkpoint import CheckpointMismatchError, NotACheckpointError
from lowrank_pl.hub import load_exactly, uninitialised
from lowrank_pl.surgery import conform_


def build(saved: SavedModel, made_by: Any = None, as_saved: bool = False) -> PreTrainedModel:
    """The Hugging Face model of a checkpoint or folder, head and factorised layers included, in eval mode.

    No weight is drawn: each has to be in the file.

    Args:
        saved: As it was read.
        made_by: An Auto class, or a class of one architecture; by default what the file tells.
        as_saved: Whether parameters get the dtypes of the file, which may be several, instead of torch's default.

    Raises:
        NotACheckpointError: nothing is given, and the file does not tell.
        CheckpointMismatchError: weights and layout disagree, or the class is none of transformers.
        UnsupportedModelError, ModelFolderError: of a dense folder, see `load_exactly`.
    """
    kind = made_by or auto_class_of(saved)
    if saved.dense_folder is not None:
        dense: PreTrainedModel = load_exactly(kind, saved.dense_folder, saved.config, as_saved).eval()
        return dense
    with uninitialised():
        # Not the configuration's dtype: the trainer's precision, which sets the default, decides.
        model: PreTrainedModel = _make(kind, saved.config)
    model.tie_weights()
    if as_saved:
        take_dtypes_(model, saved)
    saved.load_into_(model)
    take_generation_config_(model, saved)
    model.eval()
    return model


def outline(made_by: Any, config: Any, saved: SavedModel | None = None) -> nn.Module:
    """The shapes of a model without any values, on the device `meta`.

    Args:
        made_by: An Auto class, or a class of one architecture.
        config: Of the model with its head.
        saved: What it is loaded from, if it is: its factorised layers.
    """
    with torch.device("meta"), uninitialised():
        model = _make(made_by, config)
        model.tie_weights()
        if saved is not None:
            conform_(model, saved.layout, saved.source)
    return model


def auto_class_of(saved: SavedModel) -> Any:
    """The Auto class that a file tells.

    Raises:
        NotACheckpointError: it tells none.
        CheckpointMismatchError: transformers has none of this name.
    """
    if saved.auto_class is None:
        raise NotACheckpointError(saved.source, "it does not tell which class of transformers makes its model")
    found = getattr(transformers, saved.auto_class, None) if saved.auto_class.startswith("AutoModel") else None
    if found is None:
        problem = f"transformers {transformers.__version__} has no Auto class {saved.auto_class!r}"
        raise CheckpointMismatchError(saved.source, problem)
    return found


def name_in_transformers(kind: Any) -> str | None:
    """What a checkpoint tells of the class that makes its model: its name, if transformers has it under that name."""
    name = str(kind.__name__)
    return name if name.startswith("AutoModel") and getattr(transformers, name, None) is kind else None


def auto_classes_making(kind: type[PreTrainedModel], config_class: type) -> list[str]:
    """Names of the Auto classes that make a class of one architecture from its configuration, in alphabetical order."""
    from transformers.models.auto import modeling_auto  # what it holds is imported one configuration at a time

    names = []
    for name in sorted(name for name in vars(modeling_auto) if name.startswith("AutoModel")):
        found = getattr(getattr(modeling_auto, name), "_model_mapping", {}).get(config_class, ())
        if kind in (found if isinstance(found, tuple) else (found,)):
            names.append(name)
    return names


def _make(kind: Any, config: Any) -> PreTrainedModel:
    dtype = torch.get_default_dtype()
    model: PreTrainedModel = kind.from_config(config, dtype=dtype) if hasattr(kind, "from_config") else kind(config)
    return model
