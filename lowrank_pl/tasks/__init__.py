"""LightningModules around any Hugging Face encoder. They do not know the data, only its contract."""

from lowrank_pl.tasks.base import EncoderTask
from lowrank_pl.tasks.causal_lm import CausalLM
from lowrank_pl.tasks.distillation import Distillation
from lowrank_pl.tasks.masked_lm import MaskedLM
from lowrank_pl.tasks.sequence_classification import SequenceClassification
from lowrank_pl.tasks.token_classification import TokenClassification

__all__ = ["CausalLM", "Distillation", "EncoderTask", "MaskedLM", "SequenceClassification", "TokenClassification"]
