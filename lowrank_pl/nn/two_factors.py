"""Which form is put in the place of a dense layer of some shape."""

from __future__ import annotations

from lowrank_pl.core.shapes import EmbeddingShape, LinearShape
from lowrank_pl.nn.form import LayerForm, LinearForm
from lowrank_pl.nn.low_rank_embedding import LowRankEmbedding
from lowrank_pl.nn.low_rank_linear import LowRankLinear


def two_factors(shape: LinearShape) -> type[LayerForm]:
    """The form in two factors for a layer whose weight has this shape: that of a look-up, or of a linear layer."""
    return form_for(shape, LowRankLinear)


def form_for(shape: LinearShape, linear: type[LinearForm]) -> type[LayerForm]:
    """The form of a layer whose weight has this shape, where linear layers are in the given one; a look-up has one."""
    return LowRankEmbedding if isinstance(shape, EmbeddingShape) else linear
