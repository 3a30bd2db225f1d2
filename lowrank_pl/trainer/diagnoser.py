"""Diagnosis in the middle of a validation run, where model, data, device and processes are all in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lowrank_pl.allocation import Allocator, Global, Measure, Parameters, RankRequest, uniform_ranks
from lowrank_pl.core import Factors, compare_methods, kronecker_groups
from lowrank_pl.core.diagnosis import Diagnosis
from lowrank_pl.core.elementwise import ElementwiseSolver
from lowrank_pl.errors.run import EmbeddingsError
from lowrank_pl.importance import (
    Fisher,
    FullFisher,
    LayerMoments,
    Measured,
    SecondMoments,
    SecondOrderRise,
    memory_groups,
)
from lowrank_pl.nn import dense_weight
from lowrank_pl.strategies import Calibration, CompressionStrategy, StaticStrategy
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.strategies.calibration import measure_importance
from lowrank_pl.strategies.processes import assign, work_shared
from lowrank_pl.surgery import TargetSelector


class Diagnoser(pl.Callback):
    """Measures the Fisher information in several forms and diagnoses every targeted layer; the model is left as it is.

    Args:
        keep_ratio: The budget at which the methods are compared.
        strategy: Whose `targets` and `calibration` are used.
        solver: For the element-wise method.

    Attributes:
        found: Diagnoses by layer.
        ranks: At which the methods were compared, by layer.
        global_ranks: What `Global` ranks would be in the same budget, `None` for dense.
        energy_lost: Share of the energy of all layers in the Kronecker metric that `uniform` and `global` ranks lose.
        samples: How many everything was measured on.
    """

    def __init__(
        self, keep_ratio: float, strategy: CompressionStrategy, solver: ElementwiseSolver | None = None
    ) -> None:
        if strategy.targets.embeddings:
            raise EmbeddingsError("diagnose", "it compares methods that are for linear layers alone")
        self.keep_ratio = keep_ratio
        self.strategy = strategy
        self.solver = solver
        self.found: dict[str, Diagnosis] = {}
        self.ranks: dict[str, int] = {}
        self.global_ranks: dict[str, int | None] = {}
        self.energy_lost: dict[str, float] = {}
        self.samples = 0

    def allocate(self, encoder: nn.Module) -> dict[str, int]:
        """The ranks at which an encoder's layers are diagnosed; changes nothing.

        Raises:
            NoTargetError, TiedWeightError, BudgetError: no such choice of layers, or no such budget.
        """
        shapes, cost = TargetSelector.shapes(self.strategy.targets.select(encoder)), self._cost()
        allocation = uniform_ranks(shapes, self.keep_ratio, cost=cost)
        # A layer that would stay dense is compared at the highest rank that is cheaper than that.
        return {name: rank or max(1, cost.break_even(shapes[name]) - 1) for name, rank in allocation.ranks.items()}

    def _cost(self) -> Measure:
        """Parameters, in the form in which the strategy's layers end."""
        return Parameters().in_form(self.strategy.measure.form)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures and diagnoses."""
        encoder = as_compressible(pl_module, "diagnose", "per_sample_losses").encoder
        strategy = self.strategy
        calibration = strategy.calibration if isinstance(strategy, StaticStrategy) else Calibration()
        with torch.inference_mode(False), torch.enable_grad():
            targets = strategy.targets.select(encoder)
            self.ranks = self.allocate(encoder)
            energies: dict[str, Tensor] = {}
            for names in memory_groups(
                (FullFisher(), SecondMoments()), TargetSelector.shapes(targets), calibration.max_memory
            ):
                group = {name: targets[name] for name in names}
                energies |= self._diagnose(trainer, pl_module, group, calibration)
        self._weigh_energies(strategy, targets, energies)

    def _diagnose(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: Mapping[str, nn.Module],
        calibration: Calibration,
    ) -> dict[str, Tensor]:
        """Diagnoses some layers, and returns the energies of their groups in the Kronecker metric."""
        fisher = measure_importance(trainer, pl_module, layers, FullFisher(), calibration, "diagnose")
        moments = measure_importance(trainer, pl_module, layers, SecondMoments(), calibration, "diagnose")
        self.samples = fisher.num_samples
        # The element-wise method's cost: elements, times the rank.
        owners = assign({n: dense_weight(layers[n]).numel() * self.ranks[n] for n in layers}, trainer.world_size)
        tried = work_shared(trainer, owners, lambda name: self._try(name, layers[name], fisher, moments), "Diagnosis")
        # What factors do depends on all of them; to keep that would not pay.
        uncached = replace(calibration, cache=False)
        rises = SecondOrderRise({name: one.factors for name, one in tried.items()})
        risen = measure_importance(trainer, pl_module, layers, rises, uncached, "diagnose").layers
        for name, one in tried.items():
            values = risen[name].values.tolist()
            self.found[name] = one.diagnosis.judged(dict(zip(one.factors, values, strict=True)))
        return {name: one.energies for name, one in tried.items()}

    def _try(self, name: str, linear: nn.Module, fisher: Fisher, moments: Measured[LayerMoments]) -> _Tried:
        importance = fisher.layers[name].full
        assert importance is not None
        weight, layer = dense_weight(linear).detach(), moments.layers[name]
        groups = kronecker_groups(weight, layer.inputs, layer.outputs)
        diagnosis, factors = compare_methods(weight, importance, self.ranks[name], self.solver, groups=groups)
        cpu = torch.device("cpu")
        return _Tried(diagnosis, {m: f.to(torch.float32, cpu) for m, f in factors.items()}, groups.energies.cpu())

    def _weigh_energies(
        self, strategy: CompressionStrategy, layers: Mapping[str, nn.Module], energies: Mapping[str, Tensor]
    ) -> None:
        configured = strategy.allocation if isinstance(strategy, StaticStrategy) else None
        allocator: Allocator = configured if isinstance(configured, Global) else Global()
        request = RankRequest(TargetSelector.shapes(layers), self.keep_ratio, cost=self._cost())
        self.global_ranks = allocator.allocate(request, energies).ranks
        self.energy_lost = {
            "uniform": _share_lost(energies, request.uniform().ranks),
            "global": _share_lost(energies, self.global_ranks),
        }


@dataclass(frozen=True)
class _Tried:
    """What one layer gave: its diagnosis, factors by method, and energies, on the CPU."""

    diagnosis: Diagnosis
    factors: dict[str, Factors]
    energies: Tensor


def _share_lost(energies: Mapping[str, Tensor], ranks: Mapping[str, int | None]) -> float:
    """Which share of the energy of all layers lies in groups beyond their ranks."""
    total = sum(float(energy.sum()) for energy in energies.values())
    lost = sum(float(energy[rank:].sum()) for name, energy in energies.items() if (rank := ranks[name]) is not None)
    return lost / total if total > 0 else 0.0
