"""A model as it lies on disk, turned into one that runs."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lowrank_pl.contract import TargetKind
from lowrank_pl.errors.model import NotACheckpointError
from lowrank_pl.hub import uninitialised
from lowrank_pl.tasks.base import EncoderTask
from lowrank_pl.tasks.masked_lm import MaskedLM
from lowrank_pl.tasks.saved import SavedModel
from lowrank_pl.tasks.sequence_classification import SequenceClassification
from lowrank_pl.tasks.token_classification import TokenClassification

TASKS: dict[TargetKind, type[EncoderTask]] = {
    "classification": SequenceClassification,
    "regression": SequenceClassification,
    "token_classification": TokenClassification,
    "masked_lm": MaskedLM,
}


def rebuilt(saved: SavedModel) -> PreTrainedModel:
    """The Hugging Face model of a checkpoint, head and factorised layers included, in eval mode.

    Raises:
        NotACheckpointError: it does not contain what it predicts.
        CheckpointMismatchError: weights and layout disagree.
    """
    if saved.target is None:
        raise NotACheckpointError(saved.source, "it does not tell what it predicts", "export --ckpt_path")
    auto_class = TASKS[saved.target.kind].auto_class
    with uninitialised():
        encoder: PreTrainedModel = auto_class.from_config(saved.config, dtype=torch.get_default_dtype())
    encoder.tie_weights()
    saved.load_into_(encoder)
    encoder.eval()
    return encoder
