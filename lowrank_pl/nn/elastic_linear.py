"""A linear layer that is dense first, two factors later, in one parameter. m: out_features, n: in_features, r: rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_pl.core.factors import Factors
from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.numerics import RankError, ShapeError
from lowrank_pl.nn.form import Deployed, LinearForm, Spec
from lowrank_pl.nn.low_rank_linear import LowRankLinear
from lowrank_pl.nn.product import LazyProduct
from lowrank_pl.nn.view import dense_weight

Observer = Callable[[Tensor, Tensor], None]
"""Called with a layer's input `[..., n]` and the gradient at its output `[..., m]`, once per call and backward pass."""


class ElasticLinear(LinearForm):
    """`y = W x + bias`, where `W` is the parameter itself, or the product of two factors that lie in its memory.

    Below the break-even rank two factors have fewer numbers than the weight. So one parameter `storage [m, n]` holds
    the dense weight first, and from `assign_` on `left [m, r]` and `right [r, n]` one after the other, with zeros
    behind them that get no gradient. The shape of the parameter never changes, so optimizers, DDP and checkpoints see
    what they always saw; the dense form costs what a dense layer costs, in time and in memory. Ranks from break-even
    up do not exist here: they cost more than the dense form. The rank is the buffer `active` (0: dense), so it travels
    with the weights.

    Attributes:
        observer: What wants to see inputs and output gradients of training steps; `None` most of the time. It is no
            part of the state.
    """

    name = "elastic"
    is_final = False

    active: Tensor
    bias: nn.Parameter | None
    observer: Observer | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.storage = nn.Parameter(torch.zeros(out_features, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("active", torch.tensor(0, device=device))
        self._rank = 0  # the buffer as a number: reading it back would stall an accelerator in every forward
        self.observer = None

    @classmethod
    def build(
        cls, spec: Mapping[str, Any], shape: LinearShape, bias: bool, device: torch.device, dtype: torch.dtype
    ) -> ElasticLinear:
        """A dense layer of zeros; there is nothing to specify."""
        del spec
        return cls(shape.in_features, shape.out_features, bias, device, dtype)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Module) -> ElasticLinear:
        """The same layer, dense."""
        layer = cls.empty({}, linear)
        layer.storage.copy_(dense_weight(linear))
        return layer

    def spec(self) -> Spec:
        """Nothing: the rank is among the weights."""
        return {}

    @classmethod
    def rank_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        """The full rank: which one it is, only the weights tell."""
        del spec
        return shape.full_rank

    @classmethod
    def parameters_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        """`m n`."""
        del spec
        return shape.dense_params

    @property
    def is_dense(self) -> bool:
        """Whether the storage holds the dense weight."""
        return self._rank == 0

    @property
    def rank(self) -> int:
        """The rank of the factors; the full rank in the dense form."""
        return self._rank or self.shape.full_rank

    @rank.setter
    def rank(self, rank: int) -> None:
        """Says how the storage is to be read; the full rank stands for dense.

        Raises:
            RankError: a rank from break-even up, whose factors would not fit into the storage.
        """
        self._rank = 0 if rank == self.shape.full_rank else self._checked(rank)
        self.active.fill_(self._rank)

    def _checked(self, rank: int) -> int:
        self.shape.check_rank(rank)
        if self.shape.factored_params(rank) > self.shape.dense_params:
            raise RankError(rank, self.shape.dense_params // self.shape.factored_params(1))
        return rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """Views of `left [m, r]` and `right [r, n]` in the storage; gradients flow through them.

        Raises:
            RankError: the layer is dense.
        """
        if self._rank == 0:
            raise RankError(0, self.shape.full_rank)
        return split(self.storage, self._rank)

    @torch.no_grad()
    def assign_(self, factors: Factors) -> None:
        """Writes factors, with the singular values split evenly between them; the layer is factorised from then on.

        Raises:
            ShapeError: the factors have another shape.
            RankError: they would not fit.
        """
        self.write_(*factors.balanced())

    @torch.no_grad()
    def write_(self, left: Tensor, right: Tensor) -> None:
        """Writes `left [m, r]` and `right [r, n]` as they are.

        Raises:
            ShapeError, RankError: see `assign_`.
        """
        for what, given, allowed in (
            ("factors.left", left, (self.out_features, right.shape[0])),
            ("factors.right", right, (right.shape[0], self.in_features)),
        ):
            if tuple(given.shape) != allowed:
                raise ShapeError(what, tuple(given.shape), str(list(allowed)))
        self._rank = self._checked(right.shape[0])
        self.active.fill_(self._rank)
        join_(self.storage, left, right)

    def read_at(self, rank: int) -> None:
        """Sets `rank`."""
        self.rank = rank

    def product(self) -> Tensor:
        """The dense weight `[m, n]` this layer computes with."""
        if self._rank == 0:
            return self.storage
        left, right = self.factors()
        return left @ right

    @property
    def weight(self) -> Tensor:
        """The same for code that asks a linear layer for it; multiplied when its values are used."""
        if self._rank == 0 or torch.compiler.is_compiling():
            return self.product()
        return LazyProduct(*self.factors())

    @classmethod
    def product_of(cls, state: Mapping[str, Tensor]) -> Tensor:
        """The same from `storage` and `active`."""
        rank = int(state["active"])
        if rank == 0:
            return state["storage"]
        left, right = split(state["storage"], rank)
        return left @ right

    @classmethod
    def deployed(cls, state: Mapping[str, Tensor]) -> Deployed | None:
        """Two factors of exact rank, or the dense layer."""
        rank = int(state["active"])
        if rank == 0:
            return None
        left, right = (part.clone() for part in split(state["storage"].detach(), rank))
        bias = {"left.bias": state["bias"]} if "bias" in state else {}
        return Deployed(LowRankLinear, {"rank": rank}, {"left.weight": left, **bias, "right.weight": right})

    def forward(self, input: Tensor) -> Tensor:
        """`[..., n] → [..., m]`; the argument is called as that of `nn.Linear`."""
        if self.observer is not None and torch.is_grad_enabled():
            observed: Tensor = self._observed(input, self.observer)
            return observed
        return self._computed(input)

    def _computed(self, x: Tensor) -> Tensor:
        if self._rank == 0:
            return F.linear(x, self.storage, self.bias)
        left, right = self.factors()
        return F.linear(F.linear(x, right), left, self.bias)

    @torch.compiler.disable  # type: ignore[untyped-decorator] # hooks on what a compiled graph computes would be lost
    def _observed(self, x: Tensor, observer: Observer) -> Tensor:
        # A copy, because a model may write into it: into a view, as linear layers return, without its hooks.
        y = self._computed(x).clone()
        if y.requires_grad:
            inputs = x.detach()
            y.register_hook(lambda gradient: observer(inputs, gradient))
        return y

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._rank = self._checked(int(self.active)) if int(self.active) else 0

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        form = f"rank={self._rank}" if self._rank else "dense"
        return f"in_features={self.in_features}, out_features={self.out_features}, {form}, bias={self.bias is not None}"


def split(storage: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Views `[m, r]` and `[r, n]` of the two factors in a tensor `[m, n]` that `join_` has written."""
    m, n = storage.shape
    # One call, so that the backward pass concatenates once.
    left, right, _ = storage.view(-1).split([m * rank, rank * n, m * n - rank * (m + n)])
    return left.view(m, rank), right.view(rank, n)


@torch.no_grad()
def join_(storage: Tensor, left: Tensor, right: Tensor) -> None:
    """Writes `left [m, r]` and `right [r, n]` into a tensor `[m, n]` as `ElasticLinear` keeps them, then zeros."""
    flat = storage.view(-1)
    flat[: left.numel()] = left.reshape(-1).to(storage)
    flat[left.numel() : left.numel() + right.numel()] = right.reshape(-1).to(storage)
    flat[left.numel() + right.numel() :] = 0
