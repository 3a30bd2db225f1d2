"""What a linear layer costs, dense and factorised. m: out_features, n: in_features, r: rank."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_pl.errors.numerics import RankError


@dataclass(frozen=True)
class LinearShape:
    """The weight of a linear layer, `[m, n]`; biases are counted nowhere, they stay as they are.

    This is the one place that knows the cost of a rank.
    """

    out_features: int
    in_features: int

    @property
    def full_rank(self) -> int:
        """`min(m, n)`."""
        return min(self.out_features, self.in_features)

    @property
    def dense_params(self) -> int:
        """`m n`."""
        return self.out_features * self.in_features

    @property
    def params_per_rank(self) -> int:
        """Parameters of one singular group: `m + n`."""
        return self.out_features + self.in_features

    @property
    def break_even_rank(self) -> int:
        """The smallest rank at which the factors are not smaller than the dense weight: `⌈m n / (m + n)⌉`."""
        return -(-self.dense_params // self.params_per_rank)

    def factored_params(self, rank: int) -> int:
        """Parameters of the two factors at a rank: `r (m + n)`."""
        self.check_rank(rank)
        return rank * self.params_per_rank

    def pivoted_params(self, rank: int) -> int:
        """Parameters of the pivoted form at a rank: `r (m + n − r)`, at the full rank as many as dense."""
        self.check_rank(rank)
        return rank * (self.params_per_rank - rank)

    def check_rank(self, rank: int, layer: str | None = None) -> None:
        """Raises `RankError` unless `1 <= rank <= min(m, n)`."""
        if not 1 <= rank <= self.full_rank:
            raise RankError(rank, self.full_rank, layer)


@dataclass(frozen=True)
class EmbeddingShape(LinearShape):
    """The weight of a look-up, seen as a linear layer of one-hot inputs: `m` is the width, `n` the vocabulary's size.

    What a rank costs in parameters is the same. What differs: the input is a token's number, so the second moment of
    the inputs is a diagonal of frequencies, and a dense look-up multiplies nothing.
    """
