"""The averaged copies that Lightning's weight-averaging callbacks keep of a model."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch.optim.swa_utils import AveragedModel

from lowrank_pl.nn import forms_in_training
from lowrank_pl.strategies.base import as_compressible


def averaged_models(trainer: pl.Trainer) -> list[pl.LightningModule]:
    """The averaged copies of the module that is trained; empty without such callbacks.

    Lightning keeps them to itself, and who rearranges a model must rearrange them too.
    """
    callbacks: list[Callback] = getattr(trainer, "callbacks")  # noqa: B009, set without a type
    models = []
    for callback in callbacks:
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            held = callback._average_model
            model = held.module if isinstance(held, AveragedModel) else held
            if isinstance(model, pl.LightningModule):
                models.append(model)
    return models


def match_ranks_(trainer: pl.Trainer, ranks: Mapping[str, int]) -> None:
    """Gives averaged copies the ranks of the model: one that was made before a checkpoint was read has others."""
    for model in averaged_models(trainer):
        for name, layer in forms_in_training(as_compressible(model).encoder).items():
            layer.read_at(ranks[name])


def copy_buffers_instead_of_averaging_(trainer: pl.Trainer) -> None:
    """Lets averaged models take over buffers as they are.

    The buffers of an encoder are positions, ranks and tables. An average of whole numbers is cut off: the position 3
    becomes `0.9 · 3 + 0.1 · 3 = 2.9999998`, that is 2, and a rank would hardly ever arrive at its new value.
    """
    callbacks: list[Callback] = getattr(trainer, "callbacks")  # noqa: B009, set without a type
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            callback._average_model.use_buffers = False
