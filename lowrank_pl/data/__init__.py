"""Datamodules: texts and labels for compression, training and scoring."""

from lowrank_pl.data.base import TextDataModule
from lowrank_pl.data.calibration import DatasetBatches
from lowrank_pl.data.causal_text import CausalText
from lowrank_pl.data.conll import CoNLL
from lowrank_pl.data.docstrings import Docstrings
from lowrank_pl.data.glue import GLUE
from lowrank_pl.data.text_corpus import TextCorpus
from lowrank_pl.data.text_files import TextFiles

__all__ = ["GLUE", "CausalText", "CoNLL", "DatasetBatches", "Docstrings", "TextCorpus", "TextDataModule", "TextFiles"]
