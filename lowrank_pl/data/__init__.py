"""Datamodules: texts and labels for compression, training and scoring."""

from lowrank_pl.data.base import TextDataModule
from lowrank_pl.data.glue import GLUE

__all__ = ["GLUE", "TextDataModule"]
