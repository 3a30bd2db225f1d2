"""How much the loss would change if a singular group were removed, smoothed over steps. c: groups that count."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_pl.errors.numerics import RangeError


@dataclass(frozen=True)
class Groups:
    """The singular groups of one layer that count, and the gradients of the loss with respect to them.

    Attributes:
        left: `[m, c]`.
        sigma: `[c]`.
        right: `[c, n]`.
        left_grad: `[m, c]`.
        sigma_grad: `[c]`.
        right_grad: `[c, n]`.
    """

    left: Tensor
    sigma: Tensor
    right: Tensor
    left_grad: Tensor
    sigma_grad: Tensor
    right_grad: Tensor

    def widened(self) -> Groups:
        """Half precisions as float32: in float16 products of a weight and a gradient, and squares, can be zero."""
        halves = (torch.float16, torch.bfloat16)
        return Groups(*(part.float() if part.dtype in halves else part for part in vars(self).values()))


class Sensitivity(ABC):
    """Says how much the loss depends on singular groups while they are trained; remembers what steps have told."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """How many steps have been observed."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and primitives, for checkpoints."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets everything."""

    @abstractmethod
    def release(self) -> None:
        """Frees what is of no use once ranks change no more; `steps` stays."""

    def options(self) -> dict[str, Any]:
        """What identifies it in reports, as primitives."""
        told = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"class": type(self).__name__, **told}


class GroupSensitivity(Sensitivity):
    """Keeps a score per singular group: exponential moving averages over steps of what the gradients say.

    Averages are corrected for their start at zero, as Adam's are, so that early scores are not too small.

    Args:
        beta: Weight of the past, `0 <= beta < 1`.
    """

    def __init__(self, beta: float = 0.85) -> None:
        if not (math.isfinite(beta) and 0 <= beta < 1):
            raise RangeError("beta", beta, "0 <= beta < 1, the weight of the past in the moving average")
        self.beta = beta
        self._averages: dict[str, dict[str, Tensor]] = {}
        self._steps = 0

    @property
    def steps(self) -> int:
        """How many steps have been observed."""
        return self._steps

    @abstractmethod
    def update(self, name: str, groups: Groups) -> None:
        """Adds what one step's gradients say of one layer, by `average`."""

    @abstractmethod
    def scores(self, name: str) -> Tensor:
        """The scores `[c]` of a layer, `>= 0`."""

    @torch.no_grad()
    def observe(self, layers: Mapping[str, Groups]) -> bool:
        """Adds one step's gradients; a step with any gradient that is not finite is left out as a whole.

        Returns:
            Whether the step counted.
        """
        gradients = [g for groups in layers.values() for g in (groups.left_grad, groups.sigma_grad, groups.right_grad)]
        # One number per tensor (a sum is NaN or Inf where an entry is) and one look at all of them;
        # in float32, where half precisions would overflow.
        sums = [gradient.sum(dtype=torch.float32) for gradient in gradients]
        if sums and not bool(torch.isfinite(torch.stack(sums)).all()):
            return False
        self._steps += 1
        for name, groups in layers.items():
            self.update(name, groups.widened())
        return True

    def average(self, name: str, quantity: str, value: Tensor, beta: float | None = None) -> Tensor:
        """Moves an average towards a value `[c, …]`; returns it, corrected for its start at zero."""
        beta = self.beta if beta is None else beta
        kept = self._averages.setdefault(name, {})
        before = kept.get(quantity)
        before = torch.zeros_like(value) if before is None else before.to(value.device)
        kept[quantity] = torch.lerp(before, value, 1 - beta)
        return self.averaged(name, quantity, beta)

    def uncorrected(self, name: str, quantity: str) -> Tensor:
        """An average as it is."""
        return self._averages[name][quantity]

    def averaged(self, name: str, quantity: str, beta: float | None = None) -> Tensor:
        """An average, corrected for its start at zero."""
        beta = self.beta if beta is None else beta
        return self._averages[name][quantity] / (1 - beta**self._steps)

    def keep(self, name: str, kept: Tensor) -> None:
        """Forgets all groups of a layer but some: indices `[r]`, ascending."""
        for quantity, average in self._averages[name].items():
            self._averages[name][quantity] = average.index_select(0, kept.to(average.device))

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and primitives, for checkpoints."""
        averages = {name: {q: v.cpu().clone() for q, v in found.items()} for name, found in self._averages.items()}
        return {"steps": self._steps, "averages": averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._steps = int(state["steps"])
        self._averages = {name: dict(found) for name, found in state["averages"].items()}

    def release(self) -> None:
        """Frees the averages."""
        self._averages = {}

    def reset(self) -> None:
        """Forgets everything."""
        self._steps, self._averages = 0, {}


class FirstOrder(GroupSensitivity):
    """`|σ_k ∂L/∂σ_k|`: the change of the loss, to first order, when group `k` is removed.

    It equals `|⟨left_k, ∂L/∂left_k⟩|` and `|⟨right_k, ∂L/∂right_k⟩|`: scales between the three do not matter.

    References:
        Hua et al., Dynamic low-rank estimation for transformer-based language models, EMNLP Findings 2023 (the
        definition as the change of the loss; that it is taken to first order is this project's reading).
    """

    def update(self, name: str, groups: Groups) -> None:
        """Averages the magnitude."""
        self.average(name, "score", (groups.sigma * groups.sigma_grad).abs())

    def scores(self, name: str) -> Tensor:
        """The averaged magnitude."""
        return self.averaged(name, "score")


class Squared(GroupSensitivity):
    """`(σ_k ∂L/∂σ_k)²`, averaged: weighs steps with large gradients more than `FirstOrder`."""

    def update(self, name: str, groups: Groups) -> None:
        """Averages the square."""
        self.average(name, "score", (groups.sigma * groups.sigma_grad).square())

    def scores(self, name: str) -> Tensor:
        """The root of the averaged square."""
        return self.averaged(name, "score").sqrt()


class Triplet(GroupSensitivity):
    """The mean over a group's parameters of sensitivity times its uncertainty; keeps two numbers per parameter.

    Per parameter `I = |w ∂L/∂w|`, smoothed to `Ī`, and `U` the smoothed `|I − Ī|`; a group's score is `Ī U` of `σ_k`
    plus the means of `Ī U` over `left_k` and `right_k`.

    Args:
        beta: Weight of the past for the sensitivity, `0 < beta < 1`.
        beta_uncertainty: The same for the uncertainty.

    References:
        Zhang et al., AdaLoRA: adaptive budget allocation for parameter-efficient fine-tuning, ICLR 2023, equations 8
        to 11.
    """

    def __init__(self, beta: float = 0.85, beta_uncertainty: float = 0.85) -> None:
        super().__init__(beta)
        if beta == 0:
            raise RangeError("beta", beta, "0 < beta < 1: without a past no value deviates from it")
        if not (math.isfinite(beta_uncertainty) and 0 <= beta_uncertainty < 1):
            raise RangeError("beta_uncertainty", beta_uncertainty, "0 <= beta_uncertainty < 1")
        self.beta_uncertainty = beta_uncertainty

    def update(self, name: str, groups: Groups) -> None:
        """Averages sensitivities and their deviations, groups first."""
        parts = {
            "left": (groups.left * groups.left_grad).mT,
            "sigma": (groups.sigma * groups.sigma_grad)[:, None],
            "right": groups.right * groups.right_grad,
        }
        for part, product in parts.items():
            sensitivity = product.abs()
            self.average(name, part, sensitivity)
            # Uncorrected, as in the paper: a corrected average is the first value itself, whose deviation says nothing.
            deviation = (sensitivity - self.uncorrected(name, part)).abs()
            self.average(name, f"{part}_uncertainty", deviation, self.beta_uncertainty)

    def scores(self, name: str) -> Tensor:
        """Sum of the three means."""
        total = torch.zeros(())
        for part in ("left", "sigma", "right"):
            uncertainty = self.uncorrected(name, f"{part}_uncertainty")
            total = total.to(uncertainty.device) + (self.uncorrected(name, part) * uncertainty).mean(1)
        return total
