"""A linear layer in two factors of exact rank. m: out_features, n: in_features, r: rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_pl.core.factors import Factors
from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.numerics import ShapeError
from lowrank_pl.nn.svd_linear import SVDLinear


class LowRankLinear(nn.Module):
    """`y = left (right x) + bias`, the deployed form of a factorised `nn.Linear`.

    Parameters: `left [m, r]`, `right [r, n]`, `bias [m]` or `None`. Fresh parameters are zero: an instance is
    meant to be filled by `assign_` or by a state dict, and a forgotten fill shows at once.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        LinearShape(out_features, in_features).check_rank(rank)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.left = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.zeros(rank, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def like(cls, linear: nn.Linear | LowRankLinear | SVDLinear, rank: int) -> LowRankLinear:
        """An empty layer of the same features, bias, device, dtype and mode; the bias is copied."""
        reference = linear.weight if isinstance(linear, nn.Linear) else linear.left
        layer = cls(
            linear.in_features,
            linear.out_features,
            rank,
            linear.bias is not None,
            reference.device,
            reference.dtype,
        )
        if layer.bias is not None and linear.bias is not None:
            layer.bias.data.copy_(linear.bias.data)
        return layer.train(linear.training)

    @property
    def shape(self) -> LinearShape:
        """The shape of the dense weight this layer stands for."""
        return LinearShape(self.out_features, self.in_features)

    @torch.no_grad()
    def assign_(self, factors: Factors) -> None:
        """Writes factors into the existing parameters; the parameter objects stay the same.

        Raises:
            ShapeError: the factors have another shape or rank.
        """
        for name, given, own in (("left", factors.left, self.left), ("right", factors.right, self.right)):
            if given.shape != own.shape:
                raise ShapeError(f"factors.{name}", tuple(given.shape), str(list(own.shape)))
        a, b = factors.balanced()
        self.left.copy_(a)
        self.right.copy_(b)

    def product(self) -> Tensor:
        """The dense weight `[m, n]` this layer computes with."""
        return self.left @ self.right

    def forward(self, x: Tensor) -> Tensor:
        """`[..., n] → [..., m]`."""
        return F.linear(F.linear(x, self.right), self.left, self.bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )
