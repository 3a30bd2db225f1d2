"""A linear layer of rank r as r of its rows and the others in terms of these. m: out_features, n: in_features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_pl.core.factors import Factors
from lowrank_pl.core.pivoted import pivoted
from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.numerics import ShapeError
from lowrank_pl.nn.form import LinearForm, whole_number
from lowrank_pl.nn.of_rank import OfRank
from lowrank_pl.nn.product import LazyProduct
from lowrank_pl.nn.view import zero_linear


class PivotedLinear(OfRank, LinearForm):
    """`y = [p; others(p)]` in the order of the outputs, plus the bias, with `p = pivots(x)`: two `nn.Linear`.

    `pivots` has the weight `P [r, n]`, rows of `W`, and `others` the weight `K [m − r, r]`; `K P` are the other rows.
    With `r (m + n − r)` parameters it is smaller than the dense layer at every rank below the full one, and than two
    factors at every rank. Output `i` is entry `order[i]` of `[p; K p]`. Fresh parameters are zero.

    References:
        Zhao, Zhang and Cannistraci, Pivoting factorization, ICML 2025.
    """

    name = "pivoted"

    order: Tensor
    bias: nn.Parameter | None
    others: nn.Linear | None

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
        self.pivots = zero_linear(in_features, rank, False, device, dtype)
        # Without other rows there is no layer: tools that look for linears fail on an empty one.
        self.others = zero_linear(rank, out_features - rank, False, device, dtype) if rank < out_features else None
        # Not in the linears: the others' would depend on the pivots', which go through K.
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        # int32 is half as much on disk, and every index that torch and ONNX take.
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32, device=device))

    @classmethod
    def build(
        cls, spec: Mapping[str, Any], shape: LinearShape, bias: bool, device: torch.device, dtype: torch.dtype
    ) -> PivotedLinear:
        """A layer of zeros of `spec["rank"]`."""
        return cls(shape.in_features, shape.out_features, whole_number(cls.name, spec, "rank"), bias, device, dtype)

    @property
    def reference(self) -> nn.Parameter:
        """The weight of the pivots."""
        return cast(nn.Parameter, self.pivots.weight)

    @property
    def weight(self) -> Tensor:
        """The dense weight `[m, n]`, for code that asks a linear layer for it; multiplied when its values are used."""
        if self.others is None or torch.compiler.is_compiling():
            return self.product()
        return LazyProduct(self.others.weight, self.pivots.weight, self.order)

    @classmethod
    def parameters_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        """`r (m + n − r)`."""
        return shape.pivoted_params(cls.rank_of(spec, shape))

    def assign_(self, factors: Factors) -> None:
        """Chooses pivot rows anew and writes them, the others' coefficients and the order, in place.

        Raises:
            ShapeError: the factors have another shape or rank.
        """
        self._write(factors, None)

    def assign_like_(self, factors: Factors, other: PivotedLinear) -> None:
        """The same with the pivot rows of another layer."""
        self._write(factors, other.order)

    @torch.no_grad()
    def _write(self, factors: Factors, order: Tensor | None) -> None:
        for name, given, own in (
            ("factors.left", factors.left, (self.out_features, self._rank)),
            ("factors.right", factors.right, (self._rank, self.in_features)),
        ):
            if tuple(given.shape) != own:
                raise ShapeError(name, tuple(given.shape), str(list(own)))
        found = pivoted(factors, order=order)
        self.pivots.weight.copy_(found.pivots)
        if self.others is not None:
            self.others.weight.copy_(found.others)
        self.order.copy_(found.order)

    def product(self) -> Tensor:
        """The dense weight `[m, n]` this layer computes with."""
        return _product(self.pivots.weight, None if self.others is None else self.others.weight, self.order)

    @classmethod
    def product_of(cls, state: Mapping[str, Tensor]) -> Tensor:
        """The same from `pivots.weight`, `others.weight` and `order`."""
        return _product(state["pivots.weight"], state.get("others.weight"), state["order"])

    def forward(self, input: Tensor) -> Tensor:
        """`[..., n] → [..., m]`; the argument is called as that of `nn.Linear`."""
        p: Tensor = self.pivots(input)
        if self._left_is_cheaper(input.numel() // self.in_features):
            assert self.others is not None
            weight = self.others.weight
            identity = torch.eye(self._rank, dtype=weight.dtype, device=weight.device)
            left = torch.cat([identity, weight]).index_select(0, self.order)
            return F.linear(p, left, self.bias)
        rows = p if self.others is None else torch.cat([p, self.others(p)], -1)
        y = rows.index_select(-1, self.order)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _left_is_cheaper(self, tokens: int) -> bool:
        """Whether to put the rows of `[I; K]` in order once, and multiply by it, instead of the outputs of every token.

        For each token that is `r²` multiplications more, and no outputs that are written three times. That a number
        written costs as much as 64 multiplications is a rough guess from times on one CPU.
        """
        others = self.others
        # Exported files stay small, compilers fuse what is written; what a tool put in the place of a linear is called.
        if torch.compiler.is_compiling() or type(others) is not nn.Linear or others._forward_hooks:
            return False
        return type(others.weight) is nn.Parameter and self._rank < tokens and self._rank**2 < 64 * self.out_features

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self._rank}, "
            f"bias={self.bias is not None}"
        )


def _product(pivots: Tensor, others: Tensor | None, order: Tensor) -> Tensor:
    rows = pivots if others is None else torch.cat([pivots, others @ pivots])
    return rows.index_select(0, order)
