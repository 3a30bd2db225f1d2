"""A linear layer in two factors of exact rank. m: out_features, n: in_features, r: rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.core.factors import Factors
from lowrank_pl.core.precision import double
from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.numerics import ShapeError
from lowrank_pl.nn.form import LinearForm, whole_number
from lowrank_pl.nn.of_rank import OfRank
from lowrank_pl.nn.product import LazyProduct
from lowrank_pl.nn.view import zero_linear


class LowRankLinear(OfRank, LinearForm):
    """`y = left(right(x))`, the deployed form of a factorised linear layer: two `nn.Linear`.

    `right` has the weight `[r, n]` and no bias, `left` the weight `[m, r]` and the bias `[m]`, if there is one.
    Whatever looks for `nn.Linear`, to quantise, to prune or to adapt it, finds the thin ones. Fresh parameters are
    zero: an instance is meant to be filled by `assign_` or by a state dict, and a forgotten fill shows at once.
    """

    name = "low_rank"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        LinearShape(out_features, in_features).check_rank(rank)
        self._rank = rank
        # In this order, so that optimizers know the parameters by the numbers that they always had.
        self.left = zero_linear(rank, out_features, bias, device, dtype)
        self.right = zero_linear(in_features, rank, False, device, dtype)

    @classmethod
    def like(cls, layer: nn.Module, rank: int) -> LowRankLinear:
        """`empty` at a rank."""
        return cls.empty({"rank": rank}, layer)

    @classmethod
    def build(
        cls, spec: Mapping[str, Any], shape: LinearShape, bias: bool, device: torch.device, dtype: torch.dtype
    ) -> LowRankLinear:
        """A layer of zeros of `spec["rank"]`."""
        return cls(shape.in_features, shape.out_features, whole_number(cls.name, spec, "rank"), bias, device, dtype)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias `[m]`, which `left` adds."""
        bias: nn.Parameter | None = self.left.bias
        return bias

    @property
    def weight(self) -> Tensor:
        """The dense weight `[m, n]`, for code that asks a linear layer for it; not a parameter.

        Its dtype, device and shape cost nothing; it is multiplied when its values are used.
        """
        if torch.compiler.is_compiling():
            return self.product()
        return LazyProduct(self.left.weight, self.right.weight)

    @classmethod
    def parameters_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        """`r (m + n)`."""
        return shape.factored_params(cls.rank_of(spec, shape))

    @torch.no_grad()
    def assign_(self, factors: Factors) -> None:
        """Writes factors into the existing parameters, with the singular values split evenly between them.

        Raises:
            ShapeError: the factors have another shape or rank.
        """
        own = {"left": self.left.weight, "right": self.right.weight}
        for name, given in (("left", factors.left), ("right", factors.right)):
            if given.shape != own[name].shape:
                raise ShapeError(f"factors.{name}", tuple(given.shape), str(list(own[name].shape)))
        for name, values in zip(own, factors.balanced(), strict=True):
            own[name].copy_(values)

    @torch.no_grad()
    def factors(self) -> Factors:
        """Both factors in singular form, float64."""
        return Factors.from_product(double(self.left.weight), double(self.right.weight))

    def product(self) -> Tensor:
        """The dense weight `[m, n]` this layer computes with."""
        return self.left.weight @ self.right.weight

    @classmethod
    def product_of(cls, state: Mapping[str, Tensor]) -> Tensor:
        """The same from `left.weight` and `right.weight`."""
        return state["left.weight"] @ state["right.weight"]

    @classmethod
    def bias_of(cls, state: Mapping[str, Tensor]) -> Tensor | None:
        """`left.bias`."""
        return state.get("left.bias")

    def forward(self, input: Tensor) -> Tensor:
        """`[..., n] → [..., m]`; the argument is called as that of `nn.Linear`."""
        y: Tensor = self.left(self.right(input))
        return y

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self._rank}, "
            f"bias={self.bias is not None}"
        )
