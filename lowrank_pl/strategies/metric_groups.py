"""Ranks shrink by decomposing the present weights anew, in the metric of the loss. m: outputs, n: inputs, r: rank."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lowrank_pl.core import KroneckerGroups, decomposing_bytes, kronecker_groups, kronecker_regroup
from lowrank_pl.core.checks import check_finite
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.importance import KroneckerSensitivity, LayerMoments
from lowrank_pl.nn import ElasticLinear, LinearForm, forms_in_training
from lowrank_pl.strategies.averaging import averaged_models
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.strategies.group_training import GroupTraining
from lowrank_pl.strategies.processes import Agreement, assign, gathered, send_, sum_
from lowrank_pl.strategies.rank_plan import RankPlan, room_of
from lowrank_pl.surgery import follow_, reform_


class MetricGroups(GroupTraining):
    """Layers are trained dense until the first reallocation, and in two factors, formed anew at each one, after it.

    Args:
        sensitivity: Collects the moments of inputs and output gradients.
        floor: Every layer keeps at least this share of the rank that uniform ranks would give it.
        multiple_of: Every rank in two factors is a multiple.
        ends_dense: Whether a layer may be dense in the end.
    """

    sensitivity: KroneckerSensitivity

    def __init__(self, sensitivity: KroneckerSensitivity, floor: float, multiple_of: int, ends_dense: bool) -> None:
        super().__init__(sensitivity)
        self.floor = floor
        self.multiple_of = multiple_of
        self.ends_dense = ends_dense
        self._observed = 0  # the step that is being observed
        self._finite = True

    def check(self, plan: RankPlan) -> None:
        """Raises an error for blocks that do not fit, and bounds that leave no rank that two factors can hold.

        Raises:
            RangeError: such a lowest rank, unless the layer may be dense; or such blocks.
        """
        self.sensitivity.check(plan.shapes)
        for name, bound in plan.bounds.items():
            shape = plan.shapes[name]
            room, instead = room_of(shape), "" if self.ends_dense else "allow_dense: true"
            if self.ends_dense and bound.high is not None and bound.high < shape.full_rank:
                instead = f"a high of {shape.full_rank} or null, with which it stays dense"
            if bound.low > room and instead:
                allowed = f"at most {room}, from which up {name!r} costs more than when dense, or {instead}"
                raise RangeError(f"bounds[{bound.pattern!r}].low", bound.low, allowed)

    def reset(self) -> None:
        """Forgets an earlier run, whose steps had the same numbers."""
        super().reset()
        self._observed, self._finite = 0, True

    def bytes(self, plan: RankPlan) -> int:
        """The sums of moments, of all layers."""
        return sum(self.sensitivity.bytes(shape) for shape in plan.shapes.values())

    def reallocation_bytes(self, plan: RankPlan) -> int:
        """Factors of all layers before ranks are known, and what the largest layer takes to be decomposed."""
        factors = sum(4 * shape.dense_params for shape in plan.shapes.values())
        largest = (decomposing_bytes(shape) + self.sensitivity.bytes(shape) for shape in plan.shapes.values())
        return factors + max(largest, default=0)

    def form_of(self, linear: nn.Module, capacity: int) -> ElasticLinear:
        """The dense layer, with the capacity to become two factors in place."""
        del capacity
        return ElasticLinear.from_linear(linear)

    def before_batch(self, layers: Mapping[str, LinearForm], step: int, next_action: int, scale: float) -> None:
        """Lets the layers hand out their inputs and output gradients in the last steps before a reallocation."""
        observing = step > next_action - self.sensitivity.observed_steps
        if observing and step != self._observed:  # further batches of one step add to it
            self._observed = step
            self.sensitivity.begin_step()
        for name, layer in layers.items():
            assert isinstance(layer, ElasticLinear)
            layer.observer = partial(self._add, name, scale) if observing else None

    def _add(self, name: str, scale: float, x: Tensor, g: Tensor) -> None:
        self._finite &= self.sensitivity.add(name, x, g, scale)

    def observe(self, layers: Mapping[str, LinearForm]) -> bool:
        """Tells whether all that the layers have handed out was finite."""
        del layers
        finite, self._finite = self._finite, True
        return finite

    def before_checkpoint(self, trainer: pl.Trainer, plan: RankPlan, device: torch.device) -> None:
        """Adds the sums of all processes up on the first, which goes on from them, as a resumed run does."""
        if not any(gathered(trainer, self.sensitivity.steps)):
            return
        for name, shape in plan.shapes.items():
            sums = self.sensitivity.moments(name, shape, device)
            for tensor in sums:
                sum_(trainer, tensor)
            if trainer.is_global_zero and bool(sums[-1] > 0):
                self.sensitivity.replace(name, *sums)
        self.resume(trainer)

    def resume(self, trainer: pl.Trainer) -> None:
        """Only the first process has sums from before."""
        if not trainer.is_global_zero:
            self.sensitivity.release()

    def reallocate(
        self, trainer: pl.Trainer, layers: Mapping[str, LinearForm], plan: RankPlan, budget: float, final: bool
    ) -> dict[str, Tensor]:
        """Gives every layer the rank, and the factors of it, that keep most of the loss's energy."""
        elastic = {name: layer for name, layer in layers.items() if isinstance(layer, ElasticLinear)}
        for layer in elastic.values():
            layer.observer = None
        owners = assign({n: float(s.dense_params * s.full_rank) for n, s in plan.shapes.items()}, trainer.world_size)
        moments = self._summed(trainer, elastic, owners)
        groups: dict[str, KroneckerGroups] = {}
        energies: dict[str, Tensor] = {}
        with Agreement(trainer):
            for name in (name for name, owner in owners.items() if owner == trainer.global_rank):
                check_finite("the weight", elastic[name].storage.detach(), name)
                groups[name] = self._decompose(
                    elastic[name], moments.pop(name) if moments else self._own(name, elastic[name])
                )
                energies[name] = groups[name].energies.cpu()
        energies = {name: energy for share in gathered(trainer, energies) for name, energy in share.items()}
        ranks: dict[str, int] = {}
        with Agreement(trainer):
            if trainer.is_global_zero:
                present = {name: layer.rank for name, layer in elastic.items()}
                dense = self.ends_dense or not final
                ranks = plan.best(energies, budget, present, self.floor, final, self.multiple_of, dense)
        ranks = trainer.strategy.broadcast(ranks)
        self._write(trainer, elastic, {n: r for n, r in ranks.items() if r < elastic[n].rank}, owners, groups)
        return energies

    def _own(self, name: str, layer: ElasticLinear) -> LayerMoments:
        return self.sensitivity.mean(*self.sensitivity.moments(name, layer.shape, layer.storage.device))

    def _summed(
        self, trainer: pl.Trainer, layers: Mapping[str, ElasticLinear], owners: Mapping[str, int]
    ) -> dict[str, LayerMoments]:
        """The moments of all processes, of the layers that this one decomposes; empty where it is the only one."""
        found = {}
        if trainer.world_size > 1:
            for name, layer in layers.items():
                sums = self.sensitivity.moments(name, layer.shape, layer.storage.device)
                for tensor in sums:
                    sum_(trainer, tensor)
                if owners[name] == trainer.global_rank:
                    found[name] = self.sensitivity.mean(*sums)
        return found

    def _decompose(self, layer: ElasticLinear, moments: LayerMoments) -> KroneckerGroups:
        """The groups of the present product, as many as it has; energies `[min(m, n)]`, zero beyond them."""
        metric = (moments.inputs, moments.outputs, self.sensitivity.damping)
        if layer.is_dense:
            return kronecker_groups(layer.storage.detach(), *metric).first(room_of(layer.shape))
        left, right = layer.factors()
        found = kronecker_regroup(left.detach(), right.detach(), *metric)
        missing = layer.shape.full_rank - layer.rank
        return KroneckerGroups(found.left, found.right, nn.functional.pad(found.energies, (0, missing)))

    def _write(
        self,
        trainer: pl.Trainer,
        layers: Mapping[str, ElasticLinear],
        ranks: Mapping[str, int],
        owners: Mapping[str, int],
        groups: dict[str, KroneckerGroups],
    ) -> None:
        copies = [forms_in_training(as_compressible(model).encoder) for model in averaged_models(trainer)]
        for name, rank in ranks.items():
            layer = layers[name]
            left = layer.storage.new_empty(layer.out_features, rank)
            right = layer.storage.new_empty(rank, layer.in_features)
            with Agreement(trainer):
                if owners[name] == trainer.global_rank:
                    for target, part in zip((left, right), groups.pop(name).factors(rank).balanced(), strict=True):
                        target.copy_(part)
            for tensor in (left, right):
                send_(trainer, tensor, owners[name])
            before = layer.product().detach().clone() if copies else layer.storage
            reform_(layer, left, right, trainer.optimizers)
            for others in copies:
                copy = others[name]
                assert isinstance(copy, ElasticLinear)
                follow_(copy, left, right, before)
