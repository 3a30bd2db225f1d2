"""Ranks shrink by dropping groups of one singular value decomposition, whose three parts are trained."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lowrank_pl.importance import Groups, GroupSensitivity
from lowrank_pl.nn import SVDLinear
from lowrank_pl.strategies.averaging import averaged_models
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.strategies.group_training import GroupTraining
from lowrank_pl.strategies.processes import Agreement
from lowrank_pl.strategies.rank_plan import RankPlan
from lowrank_pl.surgery import keep_groups_, svd_layers


class SingularGroups(GroupTraining):
    """Every weight becomes its singular value decomposition before training; groups are dropped for good.

    Args:
        sensitivity: How groups are scored.
        per_parameter: Whether they compete by score per unit of cost.
        multiple_of: Every rank is a multiple, within the budget.
    """

    sensitivity: GroupSensitivity

    def __init__(self, sensitivity: GroupSensitivity, per_parameter: bool, multiple_of: int) -> None:
        super().__init__(sensitivity)
        self.per_parameter = per_parameter
        self.multiple_of = multiple_of

    def form_of(self, linear: nn.Module, capacity: int) -> SVDLinear:
        """The singular value decomposition, cut at the capacity."""
        return SVDLinear.from_linear(linear, capacity)

    def observe(self, layers: Mapping[str, SVDLinear]) -> bool:
        """Adds the step to the scores."""
        return self.sensitivity.observe({name: groups_of(layer) for name, layer in layers.items()})

    def reallocate(
        self, trainer: pl.Trainer, layers: Mapping[str, SVDLinear], plan: RankPlan, budget: float, final: bool
    ) -> dict[str, Tensor]:
        """Keeps the groups with the highest scores."""
        scores = {name: self.sensitivity.scores(name) for name in layers}
        # Scores are equal on all processes up to rounding; the first one decides, so that ranks are equal exactly.
        chosen = {}
        with Agreement(trainer):
            if trainer.is_global_zero:
                chosen = plan.choose(scores, budget, self.per_parameter, final, self.multiple_of)
        kept = trainer.strategy.broadcast(chosen)
        kept = {name: groups for name, groups in kept.items() if len(groups) < layers[name].rank}
        keep_everywhere_(trainer, layers, kept)
        for name, groups in kept.items():
            self.sensitivity.keep(name, groups)
        return scores


def keep_everywhere_(trainer: pl.Trainer, layers: Mapping[str, SVDLinear], kept: Mapping[str, Tensor]) -> None:
    """Keeps some groups of layers and drops the others: of parameters, optimizer states and averaged copies.

    Args:
        trainer: Of the run.
        layers: Of the model, by name.
        kept: Of those that change, the indices of the groups to keep, `[r]`, ascending.

    Raises:
        OptimizerStateError, HiddenOptimizerStateError: an optimizer whose state cannot be divided among groups.
    """
    averaged = [svd_layers(as_compressible(model).encoder) for model in averaged_models(trainer)]
    for name, groups in kept.items():
        keep_groups_(layers[name], groups, trainer.optimizers)
        for copies in averaged:
            keep_groups_(copies[name], groups)


def groups_of(layer: SVDLinear) -> Groups:
    """The groups that count; a layer that took no part in the step has gradients of zero."""
    rank = layer.rank
    left, sigma, right = (p if p.grad is None else p.grad for p in (layer.left, layer.sigma, layer.right))
    if layer.sigma.grad is None:
        left, sigma, right = (torch.zeros_like(tensor) for tensor in (left, sigma, right))
    return Groups(
        layer.left.detach()[:, :rank],
        layer.sigma.detach()[:rank],
        layer.right.detach()[:rank],
        left[:, :rank],
        sigma[:rank],
        right[:rank],
    )
