"""A linear layer in singular groups whose number shrinks in training. m: out_features, n: in_features, c: capacity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_pl.core.factors import Factors
from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.core.svd import truncated_svd
from lowrank_pl.errors.numerics import RankError


class SVDLinear(nn.Module):
    """`y = Σ_{k < rank} left[:, k] σ_k (right[k] · x) + bias`: the first `rank` of `c` singular groups count.

    Parameters: `left [m, c]`, `sigma [c]`, `right [c, n]`, `bias [m]` or `None`. Their shapes never change, so an
    optimizer, DDP and checkpoints see constant parameters, while `forward` works on views of the first groups and
    costs what they cost. The number of groups is the buffer `active`, so it travels with the weights.

    `forward` multiplies with the two factors one after the other, or with their product, whichever is cheaper for the
    number of tokens at hand: the same function either way.
    """

    active: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        capacity: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        LinearShape(out_features, in_features).check_rank(capacity)
        self.in_features = in_features
        self.out_features = out_features
        self.left = nn.Parameter(torch.zeros(out_features, capacity, device=device, dtype=dtype))
        self.sigma = nn.Parameter(torch.zeros(capacity, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.zeros(capacity, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("active", torch.tensor(capacity, device=device))
        self._rank = capacity  # the buffer as a number: reading it back would stall an accelerator in every forward

    @classmethod
    def like(cls, layer: nn.Linear | SVDLinear, capacity: int) -> SVDLinear:
        """An empty layer of the same features, bias, device, dtype and mode; the bias is copied."""
        reference = layer.weight if isinstance(layer, nn.Linear) else layer.left
        has_bias = layer.bias is not None
        features = (layer.in_features, layer.out_features)
        made = cls(*features, capacity, has_bias, reference.device, reference.dtype)
        if made.bias is not None and layer.bias is not None:
            made.bias.data.copy_(layer.bias.data)
        return made.requires_grad_(reference.requires_grad).train(layer.training)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, capacity: int | None = None) -> SVDLinear:
        """The singular value decomposition of a dense layer, computed in float64.

        Args:
            linear: Finite weights.
            capacity: Groups to keep, the largest; all by default, and the function is then the same.

        Raises:
            RankError, NonFiniteError: an impossible capacity; NaN or Inf in the weight.
        """
        layer = cls.like(linear, min(linear.weight.shape) if capacity is None else capacity)
        factors = truncated_svd(linear.weight.detach(), layer.capacity)
        layer.left.copy_(factors.left)
        layer.sigma.copy_(factors.sigma)
        layer.right.copy_(factors.right)
        return layer

    @property
    def capacity(self) -> int:
        """Number of groups `c` that there is room for."""
        return self.sigma.numel()

    @property
    def rank(self) -> int:
        """Number of groups that count."""
        return self._rank

    @rank.setter
    def rank(self, rank: int) -> None:
        if not 1 <= rank <= self.capacity:
            raise RankError(rank, self.capacity)
        self._rank = rank
        self.active.fill_(rank)

    @property
    def shape(self) -> LinearShape:
        """The shape of the dense weight this layer stands for."""
        return LinearShape(self.out_features, self.in_features)

    def product(self) -> Tensor:
        """The dense weight `[m, n]` this layer computes with."""
        k = self._rank
        return (self.left[:, :k] * self.sigma[:k]) @ self.right[:k]

    def factors(self) -> Factors:
        """The groups that count, in singular form: after training they are no longer orthonormal, so anew."""
        k = self._rank
        with torch.no_grad():
            a, b = (self.left[:, :k] * self.sigma[:k]).double(), self.right[:k].double()
            return Factors.from_product(a, b).to(self.left.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., n] → [..., m]`."""
        if self._product_is_cheaper(x.numel() // self.in_features):
            return F.linear(x, self.product(), self.bias)
        k = self._rank
        # σ goes into the smaller of the things it could scale: a factor, not the tokens.
        return F.linear(F.linear(x, self.sigma[:k, None] * self.right[:k]), self.left[:, :k], self.bias)

    def _product_is_cheaper(self, tokens: int) -> bool:
        """Multiplications of one product and one layer, against two thin layers; the backward has twice of either."""
        dense = self.out_features * self.in_features
        return tokens * self._rank * (self.out_features + self.in_features) > dense * (tokens + self._rank)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.rank = int(self.active)  # refuses what the capacity does not hold

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self._rank}, "
            f"capacity={self.capacity}, bias={self.bias is not None}"
        )
