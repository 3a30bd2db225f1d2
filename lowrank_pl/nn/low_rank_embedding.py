"""A look-up in two factors of exact rank. v: size of the vocabulary, d: width, r: rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.core.factors import Factors
from lowrank_pl.core.shapes import EmbeddingShape, LinearShape
from lowrank_pl.errors.numerics import ShapeError
from lowrank_pl.nn.form import entries_of, reference_of, shape_of, take_over_, whole_number
from lowrank_pl.nn.of_rank import OfRank
from lowrank_pl.nn.product import LazyProduct


class LowRankEmbedding(OfRank):
    """`y = left[token] · right`, the deployed form of a factorised look-up in `E [v, d] ≈ left right`.

    `left` is an `nn.Embedding` with the weight `[v, r]`; one product with `right.weight [r, d]` follows. Fresh
    parameters are zero. As a form of a layer it stands for a linear layer of one-hot inputs, whose weight is `Eᵀ
    [d, v]`: `product()` and the factors that `assign_` takes are those of `Eᵀ`.

    Attributes:
        num_embeddings: v.
        embedding_dim: d.
        padding_idx: The token whose row of `left` gets no gradient, as that of `E` got none; `None` for none.
    """

    name = "low_rank_embedding"
    stands_for = EmbeddingShape

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        EmbeddingShape(embedding_dim, num_embeddings).check_rank(rank)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.dense_class = nn.Embedding
        self._rank = rank
        self.left = _zero_embedding(num_embeddings, rank, padding_idx, device, dtype)
        self.right = Product(rank, embedding_dim, device, dtype)

    @classmethod
    def empty(cls, spec: Mapping[str, Any], like: nn.Module) -> LowRankEmbedding:
        """A look-up to be filled, in the place of an `nn.Embedding` or of another one of this form; see `LayerForm`."""
        shape, reference = shape_of(like), reference_of(like)
        made = cls(
            shape.in_features,
            shape.out_features,
            whole_number(cls.name, spec, "rank"),
            getattr(like, "padding_idx", None),
            reference.device,
            reference.dtype,
        )
        take_over_(made, like)
        return made

    def empty_dense(self) -> nn.Module:
        """An `nn.Embedding` of zeros."""
        reference = self.reference
        made = _zero_embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, reference.device, reference.dtype
        )
        take_over_(made, self)
        return made

    @property
    def shape(self) -> EmbeddingShape:
        """That of `Eᵀ`."""
        return EmbeddingShape(self.embedding_dim, self.num_embeddings)

    @property
    def weight(self) -> Tensor:
        """`E [v, d]`, for code that asks a look-up for it; not a parameter, multiplied when its values are used."""
        if torch.compiler.is_compiling():
            return self.left.weight @ self.right.weight
        return LazyProduct(self.left.weight, self.right.weight)

    @classmethod
    def parameters_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        """`r (v + d)`."""
        return shape.factored_params(cls.rank_of(spec, shape))

    @classmethod
    def flops_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        """`2 r d` per token: looking up takes none."""
        return 2 * cls.rank_of(spec, shape) * shape.out_features

    @torch.no_grad()
    def assign_(self, factors: Factors) -> None:
        """Writes factors of `Eᵀ`, `left [d, r]` and `right [r, v]`, with the singular values split evenly.

        Raises:
            ShapeError: the factors have another shape or rank.
        """
        for what, given, allowed in (
            ("factors.left", factors.left, self.right.weight.mT),
            ("factors.right", factors.right, self.left.weight.mT),
        ):
            if given.shape != allowed.shape:
                raise ShapeError(what, tuple(given.shape), str(list(allowed.shape)))
        right, left = factors.balanced()
        self.left.weight.copy_(left.mT)
        self.right.weight.copy_(right.mT)

    def product(self) -> Tensor:
        """`Eᵀ [d, v]`."""
        return (self.left.weight @ self.right.weight).mT

    @classmethod
    def product_of(cls, state: Mapping[str, Tensor]) -> Tensor:
        """The same from `left.weight` and `right.weight`."""
        return (state["left.weight"] @ state["right.weight"]).mT

    @classmethod
    def dense_state(cls, state: Mapping[str, Tensor], name: str, transposed: bool = False) -> dict[str, Tensor]:
        """What `dense` would make of the look-up `name` of a model, as the state dict of an `nn.Embedding`."""
        del transposed
        return {"weight": cls.product_of(entries_of(state, name)).mT}

    def forward(self, input: Tensor) -> Tensor:
        """`[...] → [..., d]`; the argument is called as that of `nn.Embedding`."""
        y: Tensor = self.right(self.left(input))
        return y

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, rank={self._rank}{padding}"


class Product(nn.Module):
    """`y = x · weight`, `[..., r] → [..., d]`.

    The weight lies as `[r, d]`, the way round in which a head that is tied to the vocabulary has it in its own right
    factor: one tensor serves both.
    """

    weight: nn.Parameter

    def __init__(
        self, rank: int, features: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rank, features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., r] → [..., d]`."""
        return x @ self.weight


def _zero_embedding(
    size: int, width: int, padding_idx: int | None, device: torch.device | None, dtype: torch.dtype | None
) -> nn.Embedding:
    zeros = torch.zeros(size, width, device=device, dtype=dtype)
    made: nn.Embedding = nn.Embedding.from_pretrained(zeros, freeze=False, padding_idx=padding_idx)
    return made
