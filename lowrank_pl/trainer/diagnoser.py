"""Diagnosis in the middle of a validation run, where model, data, device and processes are all in place."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn

from lowrank_pl.allocation import uniform_ranks
from lowrank_pl.core.diagnosis import Diagnosis, diagnose
from lowrank_pl.core.elementwise import ElementwiseSolver
from lowrank_pl.importance import Fisher, FullFisher
from lowrank_pl.nn import dense_weight
from lowrank_pl.strategies import Calibration, StaticStrategy
from lowrank_pl.strategies.calibration import measure_importance
from lowrank_pl.strategies.processes import assign, work_shared
from lowrank_pl.surgery import TargetSelector
from lowrank_pl.tasks import EncoderTask


class Diagnoser(pl.Callback):
    """Measures the full Fisher information and diagnoses every targeted layer; the model is left as it is.

    Args:
        keep_ratio: The budget at which the methods are compared.
        solver: For the element-wise method.
    """

    def __init__(self, keep_ratio: float, solver: ElementwiseSolver | None = None) -> None:
        self.keep_ratio = keep_ratio
        self.solver = solver
        self.found: dict[str, Diagnosis] = {}
        self.ranks: dict[str, int] = {}
        self.samples = 0

    def allocate(self, encoder: nn.Module, targets: TargetSelector) -> dict[str, int]:
        """The ranks at which an encoder's layers are diagnosed; changes nothing.

        Raises:
            NoTargetError, TiedWeightError, BudgetError: no such choice of layers, or no such budget.
        """
        allocation = uniform_ranks(targets.shapes(targets.select(encoder)), self.keep_ratio)
        # A layer that would stay dense is compared at the highest rank that is cheaper than that.
        return {
            name: rank or max(1, allocation.shapes[name].break_even_rank - 1) for name, rank in allocation.ranks.items()
        }

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures and diagnoses."""
        assert isinstance(pl_module, EncoderTask)
        strategy = pl_module.strategy
        calibration = strategy.calibration if isinstance(strategy, StaticStrategy) else Calibration()
        with torch.inference_mode(False), torch.enable_grad():
            targets = strategy.targets.select(pl_module.encoder)
            self.ranks = self.allocate(pl_module.encoder, strategy.targets)
            fisher = measure_importance(trainer, pl_module, targets, FullFisher(), calibration, "diagnose")
            self.samples = fisher.num_samples
            # The element-wise method's cost: elements, times the rank.
            owners = assign({n: dense_weight(targets[n]).numel() * self.ranks[n] for n in targets}, trainer.world_size)
            self.found = work_shared(trainer, owners, lambda name: self._one(name, targets[name], fisher), "Diagnosis")

    def _one(self, name: str, linear: nn.Module, fisher: Fisher) -> Diagnosis:
        importance = fisher.layers[name].full
        assert importance is not None
        return diagnose(dense_weight(linear).detach(), importance, self.ranks[name], self.solver)
