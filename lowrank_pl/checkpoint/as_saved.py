"""What transformers' own loader takes over from a folder besides the weights."""

from __future__ import annotations

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from lowrank_pl.checkpoint.saved import SavedModel
from lowrank_pl.surgery import conform_


def take_dtypes_(model: nn.Module, saved: SavedModel) -> None:
    """Gives a model the shapes of a saved one, and every parameter and buffer the dtype that its file has."""
    conform_(model, saved.layout, saved.source)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in saved.state and tensor.dtype != saved.state[name].dtype:
            tensor.data = tensor.data.to(saved.state[name].dtype)


def take_generation_config_(model: PreTrainedModel, saved: SavedModel) -> None:
    """Lets a model generate as the saved one did, where the file tells."""
    if model.can_generate() and saved.generation is not None:
        model.generation_config = GenerationConfig.from_dict(dict(saved.generation))
