"""Diagnosis in the middle of a validation run, where model, data, device and processes are all in place."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import nn

from lowrank_pl.allocation import uniform_ranks
from lowrank_pl.core.diagnosis import Diagnosis, diagnose
from lowrank_pl.core.elementwise import ElementwiseSolver
from lowrank_pl.importance import Fisher, FisherKind
from lowrank_pl.strategies import Calibration, StaticStrategy
from lowrank_pl.strategies.calibration import measure_fisher, progress
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

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures and diagnoses."""
        assert isinstance(pl_module, EncoderTask)
        strategy = pl_module.strategy
        calibration = strategy.calibration if isinstance(strategy, StaticStrategy) else Calibration()
        with torch.inference_mode(False), torch.enable_grad():
            targets = strategy.targets.select(pl_module.encoder)
            allocation = uniform_ranks(strategy.targets.shapes(targets), self.keep_ratio)
            # A layer that would stay dense is compared at the highest rank that is cheaper than that.
            self.ranks = {
                name: rank or max(1, allocation.shapes[name].break_even_rank - 1)
                for name, rank in allocation.ranks.items()
            }
            fisher = measure_fisher(trainer, pl_module, targets, FisherKind.FULL, calibration, "diagnose")
            self.samples = fisher.num_samples
            if trainer.is_global_zero:
                self._diagnose(trainer, targets, fisher)

    def _diagnose(self, trainer: pl.Trainer, targets: Mapping[str, nn.Linear], fisher: Fisher) -> None:
        for name, linear in progress(trainer, targets.items(), "Diagnosis", len(targets)):
            importance = fisher.layers[name].full
            assert importance is not None
            self.found[name] = diagnose(linear.weight.detach(), importance, self.ranks[name], self.solver)
