"""A linear layer in singular groups whose number shrinks in training. m: out_features, n: in_features, c: capacity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_pl.core.factors import Factors
from lowrank_pl.core.precision import double
from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.core.svd import truncated_svd
from lowrank_pl.errors.numerics import RankError, ShapeError
from lowrank_pl.nn.form import Deployed, LinearForm, Spec, whole_number
from lowrank_pl.nn.low_rank_linear import LowRankLinear
from lowrank_pl.nn.product import LazyProduct
from lowrank_pl.nn.view import dense_weight


class SVDLinear(LinearForm):
    """`y = Σ_{k < rank} left[:, k] σ_k (right[k] · x) + bias`: the first `rank` of `c` singular groups count.

    Parameters: `left [m, c]`, `sigma [c]`, `right [c, n]`, `bias [m]` or `None`. Their shapes never change, so an
    optimizer, DDP and checkpoints see constant parameters, while `forward` works on views of the first groups and
    costs what they cost. The number of groups is the buffer `active`, so it travels with the weights.

    `forward` multiplies with the two factors one after the other, or with their product, whichever is cheaper for the
    number of tokens at hand: the same function either way.
    """

    name = "singular_groups"
    is_final = False

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
        super().__init__(in_features, out_features)
        LinearShape(out_features, in_features).check_rank(capacity)
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
    def like(cls, layer: nn.Module, capacity: int) -> SVDLinear:
        """`empty` with a capacity."""
        return cls.empty({"capacity": capacity}, layer)

    @classmethod
    def build(
        cls, spec: Mapping[str, Any], shape: LinearShape, bias: bool, device: torch.device, dtype: torch.dtype
    ) -> SVDLinear:
        """A layer of zeros with room for `spec["capacity"]` groups, all of which count."""
        capacity = whole_number(cls.name, spec, "capacity")
        return cls(shape.in_features, shape.out_features, capacity, bias, device, dtype)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Module, capacity: int | None = None) -> SVDLinear:
        """The singular value decomposition of a dense layer, computed in float64.

        Args:
            linear: A dense layer with finite weights.
            capacity: Groups to keep, the largest; all by default, and the function is then the same.

        Raises:
            RankError, NonFiniteError: an impossible capacity; NaN or Inf in the weight.
        """
        weight = dense_weight(linear)
        layer = cls.like(linear, min(weight.shape) if capacity is None else capacity)
        layer.assign_(truncated_svd(weight.detach(), layer.capacity))
        return layer

    def spec(self) -> Spec:
        """The capacity; how many groups count is among the weights."""
        return {"capacity": self.capacity}

    @classmethod
    def rank_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        """The capacity."""
        del shape
        return whole_number(cls.name, spec, "capacity")

    @classmethod
    def parameters_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        """`c (m + n + 1)`: all groups, whether they count or not, and their singular values."""
        capacity = whole_number(cls.name, spec, "capacity")
        return shape.factored_params(capacity) + capacity

    @classmethod
    def flops_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        """`2 c (m + n)` with all groups: the singular values are no work per token."""
        return 2 * shape.factored_params(whole_number(cls.name, spec, "capacity"))

    @torch.no_grad()
    def assign_(self, factors: Factors) -> None:
        """Writes as many groups as there is room for.

        Raises:
            ShapeError: the factors have another shape or rank.
        """
        given = {"left": factors.left, "sigma": factors.sigma, "right": factors.right}
        own = {"left": self.left, "sigma": self.sigma, "right": self.right}
        for name, tensor in given.items():
            if tensor.shape != own[name].shape:
                raise ShapeError(f"factors.{name}", tuple(tensor.shape), str(list(own[name].shape)))
        for name, tensor in given.items():
            own[name].copy_(tensor)

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

    def read_at(self, rank: int) -> None:
        """Sets `rank`."""
        self.rank = rank

    def product(self) -> Tensor:
        """The dense weight `[m, n]` this layer computes with."""
        left, right = self._two()
        return left @ right

    def _two(self) -> tuple[Tensor, Tensor]:
        """Factors `[m, k]` and `[k, n]` of the groups that count."""
        k = self._rank
        return self.left[:, :k] * self.sigma[:k], self.right[:k]

    @property
    def weight(self) -> Tensor:
        """The same for code that asks a linear layer for it; multiplied when its values are used."""
        if torch.compiler.is_compiling():
            return self.product()
        return LazyProduct(*self._two())

    @classmethod
    def product_of(cls, state: Mapping[str, Tensor]) -> Tensor:
        """The same from the parameters and `active`."""
        a, b = _factors_of(state)
        return a @ b

    def factors(self) -> Factors:
        """The groups that count, in singular form: after training they are no longer orthonormal, so anew."""
        return _singular_form(self.state_dict())

    @classmethod
    def deployed(cls, state: Mapping[str, Tensor]) -> Deployed:
        """Two factors of exact rank."""
        factors = _singular_form(state)
        left, right = factors.balanced()
        bias = {"left.bias": state["bias"]} if "bias" in state else {}
        kept = {"left.weight": left, **bias, "right.weight": right}
        return Deployed(LowRankLinear, {"rank": factors.rank}, kept)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., n] → [..., m]`; the argument is called as that of `nn.Linear`."""
        if self._product_is_cheaper(input.numel() // self.in_features):
            return F.linear(input, self.product(), self.bias)
        k = self._rank
        # σ goes into the smaller of the things it could scale: a factor, not the tokens.
        return F.linear(F.linear(input, self.sigma[:k, None] * self.right[:k]), self.left[:, :k], self.bias)

    def _product_is_cheaper(self, tokens: int) -> bool:
        """Multiplications of one product and one layer, against two thin layers; the backward has twice of either."""
        if torch.compiler.is_compiling():
            return False  # the choice would be compiled in, and again for every layer and rank where it changes
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


def _factors_of(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`[m, r]`, the singular values in it, and `[r, n]`."""
    k = int(state["active"])
    return state["left"][:, :k] * state["sigma"][:k], state["right"][:k]


def _singular_form(state: Mapping[str, Tensor]) -> Factors:
    a, b = _factors_of(state)
    with torch.no_grad():
        return Factors.from_product(double(a), double(b)).like(a)
