"""New factors for a layer in training, and its optimizer's moments in their basis. m: outputs, n: inputs, r: rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_pl.core.precision import double
from lowrank_pl.nn import ElasticLinear
from lowrank_pl.nn.elastic_linear import join_, split
from lowrank_pl.surgery.optimizer_state import states_of

# By what torch's optimizers call their averages.
_GRADIENTS = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
_SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"})
_MAGNITUDES = frozenset({"exp_inf"})


@dataclass(frozen=True)
class ChangeOfBasis:
    """How gradients of new factors follow from those of what was there before.

    With `P` the product, `∂L/∂A = ∂L/∂P Bᵀ` and `∂L/∂B = Aᵀ ∂L/∂P`. So from the dense form they are `∂L/∂W B'ᵀ` and
    `A'ᵀ ∂L/∂W`. From factors, whose row and column spaces hold those of the new ones, `B' = T B` and `A' = A S` give
    `∂L/∂A Tᵀ` and `Sᵀ ∂L/∂B`.

    Attributes:
        left: What the gradient of the weight, or of the left factor, is multiplied by from the right: `B'ᵀ` or `Tᵀ`.
        right: What that of the weight, or of the right factor, is multiplied by from the left: `A'ᵀ` or `Sᵀ`.
        rank: Of what was there before; 0: dense.
    """

    left: Tensor
    right: Tensor
    rank: int

    @classmethod
    def between(cls, layer: ElasticLinear, left: Tensor, right: Tensor) -> ChangeOfBasis:
        """From a layer as it is to `left [m, r]` and `right [r, n]`, in float64."""
        left, right = double(left), double(right)
        if layer.is_dense:
            return cls(right.mT, left.mT, 0)
        a, b = (double(part.detach()) for part in layer.factors())
        # Least squares by QR: factors in training are far from singular, and this is exact where spaces nest.
        t = torch.linalg.lstsq(b.mT, right.mT).solution
        s = torch.linalg.lstsq(a, left).solution
        return cls(t, s.mT, layer.rank)

    def of(self, state: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
        """A state `[m, n]` as that of the new factors, `[m, r]` and `[r, n]`, in float64.

        Averages of gradients follow exactly. Averages of squares do so as if the entries of a gradient were
        independent: their factors are squared.
        """
        wide = double(state)
        before_left, before_right = (wide, wide) if self.rank == 0 else split(wide, self.rank)
        left, right = (self.left.square(), self.right.square()) if squares else (self.left, self.right)
        return before_left @ left, right @ before_right

    def of_all(self, states: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """What an optimizer keeps of a layer, by name, as that of the new factors; see `of`."""
        moved = {}
        for name, state in states.items():
            if name in _MAGNITUDES:
                left, right = self.of(double(state).square(), squares=True)
                moved[name] = left.sqrt(), right.sqrt()
            else:
                moved[name] = self.of(state, squares=name in _SQUARES)
        if "grad_avg" in states:  # a centred square is one of deviations, which must not become negative
            means = double(states["grad_avg"])
            deviations = self.of((double(states["square_avg"]) - means.square()).clamp(min=0), squares=True)
            left, right = (d + m.square() for d, m in zip(deviations, moved["grad_avg"], strict=True))
            moved["square_avg"] = left, right
        return moved


@torch.no_grad()
def reform_(layer: ElasticLinear, left: Tensor, right: Tensor, optimizers: Iterable[Optimizer] = ()) -> None:
    """Writes new factors into a layer, and what the optimizers remember of it in their basis; no shape changes.

    Args:
        layer: Dense, or with factors of no lower a rank, whose row and column spaces hold those of the new ones.
        left: `[m, r]`.
        right: `[r, n]`.
        optimizers: Those whose state of the layer's storage moves along.

    Raises:
        ShapeError, RankError: factors of another shape, or that do not fit. Nothing has been changed then.
        UnknownOptimizerStateError, OptimizerStateError, HiddenOptimizerStateError: see `states_of`. Nothing has been
            changed then.
    """
    states = dict(states_of(layer.storage, optimizers, _GRADIENTS | _SQUARES | _MAGNITUDES))
    moved = ChangeOfBasis.between(layer, left, right).of_all(states) if states else {}
    layer.write_(left, right)
    for name, parts in moved.items():
        join_(states[name], *parts)


@torch.no_grad()
def follow_(copy: ElasticLinear, left: Tensor, right: Tensor, before: Tensor) -> None:
    """Gives an averaged copy of a layer the basis `left`, as the layer itself got it.

    What the copy's product differs by from the layer's is brought to the space of `left` by least squares, so a copy
    that was equal stays so.

    Args:
        copy: The averaged layer.
        left: `[m, r]` of the layer.
        right: `[r, n]` of the layer.
        before: The product `[m, n]` that the layer had before it got these factors.
    """
    difference = double(copy.product()) - double(before)
    own = double(right) + torch.linalg.lstsq(double(left), difference).solution
    copy.write_(left.to(copy.storage), own.to(copy.storage))
