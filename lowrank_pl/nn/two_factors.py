"""Which form in two factors of exact rank is put in the place of a dense layer."""

from __future__ import annotations

from lowrank_pl.core.shapes import EmbeddingShape, LinearShape
from lowrank_pl.nn.form import LayerForm
from lowrank_pl.nn.low_rank_embedding import LowRankEmbedding
from lowrank_pl.nn.low_rank_linear import LowRankLinear


def two_factors(shape: LinearShape) -> type[LayerForm]:
    """The form for a layer whose weight has this shape: that of a look-up, or of a linear layer."""
    return LowRankEmbedding if isinstance(shape, EmbeddingShape) else LowRankLinear
