"""Singular groups during a run: their gradients, and dropping them wherever Lightning keeps a copy."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor

from lowrank_pl.importance import Groups
from lowrank_pl.nn import SVDLinear, forms_in_training
from lowrank_pl.strategies.averaging import averaged_models
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.surgery import keep_groups_, svd_layers


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


def match_ranks_(trainer: pl.Trainer, ranks: Mapping[str, int]) -> None:
    """Gives averaged copies the ranks of the model: one that was made before a checkpoint was read has others."""
    for model in averaged_models(trainer):
        for name, layer in forms_in_training(as_compressible(model).encoder).items():
            layer.read_at(ranks[name])


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
