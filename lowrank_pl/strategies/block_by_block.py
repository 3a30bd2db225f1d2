"""Layers factorised one after the other, for the inputs that their factorised predecessors give them.

m: out_features, n: in_features, r: rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import groupby
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lowrank_pl.contract import CalibrationBatches
from lowrank_pl.core import Compensation, PairedSums, compensation, relative_error
from lowrank_pl.core.precision import float64_device
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.importance.frozen import frozen_eval
from lowrank_pl.importance.gram import GramSum
from lowrank_pl.nn import LowRankLinear, dense_weight, input_of
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.strategies.calibration import Calibration, calibration_batches
from lowrank_pl.strategies.decomposition import Factorised
from lowrank_pl.strategies.kept_calls import (
    KeptCalls,
    Pass,
    check_activations,
    model_of,
    order_of_calls,
    without_cache,
)
from lowrank_pl.strategies.layer_factoriser import Record
from lowrank_pl.strategies.padding import unpadded
from lowrank_pl.strategies.processes import Agreement, gathered, progress, send_
from lowrank_pl.strategies.replay import SeenEnoughError, Stage


class Work(Protocol):
    """What a method does to the layers of a model that is factorised block by block.

    Attributes:
        dense: The dense layers of all that has been exchanged, by name; `begin` adds to it.
        owners: Which process decomposes which layer.
    """

    dense: dict[str, nn.Module]
    owners: Mapping[str, int]

    def begin(self, names: Sequence[str]) -> None:
        """Exchanges the layers of the next block for empty factors."""
        ...

    def decompose(self, name: str, weight: Tensor, moment: Tensor) -> Factorised:
        """Factorises a weight `[m, n]` at the layer's rank, given the second moment `[n, n]` of its inputs."""
        ...

    def finish(self, names: Sequence[str], told: Mapping[str, Record]) -> None:
        """Takes note that all layers of a block have their factors."""
        ...

    def leave(self, names: Sequence[str]) -> None:
        """Takes note that the dense layers of a block will not be called again."""
        ...


class BlockByBlock:
    """Factorises layers in the order of their calls, each for the inputs that the factorised ones before it give it.

    Ranks are those that the method gives by what it has measured of the dense model. Then, with `x` what a layer gets
    in the dense model and `z` what it gets behind the factorised layers before it,

        M = argmin Σ ‖W x − M z‖²,    minimise  ‖G^½ (M − A B) C_z^½‖_F,    C_z the second moment of z,

    which together give the outputs on `z` that are closest to those of the dense layer on `x`, in the method's metric
    of the outputs. Where the layer has a bias, it makes up for the means. Layers that get one tensor are factorised
    together, and what a block is called with is kept while its layers are.

    Layers that are called several times in a pass, or never, are factorised beforehand for the inputs of the dense
    model. Where the two models give a layer other tokens, as they may to experts, `M` is `W`.

    References:
        Wang et al., SVD-LLM: Truncation-aware singular value decomposition for large language model compression, ICLR
        2025, arXiv:2403.07378: with side `input`, uniform ranks and `toward: own_inputs` each weight is whitened by the
        inputs that compressed blocks give it, as in the layer-wise closed-form update of its first versions, which
        updates the left factor alone, and whose right factor is that of the dense model's inputs. That the target is
        what the dense model puts out, that it is met by both factors in the metric of the loss, and that inputs inside
        a block are followed as well, is this project's.

    Args:
        toward: What layers are fitted to: `dense_outputs`, `W x`; or `own_inputs`, `W z`, which leaves what the layers
            before have changed as it is.
        ridge: How strongly `M` keeps to `W`, relative to the diagonal of `Σ z zᵀ`, `> 0`; `null`: for every input as
            generalised cross-validation says, which also leaves `M = W` where there are too few tokens to know better.
        max_samples: How many of the calibration samples are used at most.
    """

    def __init__(self, toward: str = "dense_outputs", ridge: float | None = None, max_samples: int = 512) -> None:
        if toward not in ("dense_outputs", "own_inputs"):
            raise RangeError("sequential.toward", toward, "'dense_outputs' or 'own_inputs'")
        if ridge is not None and not (math.isfinite(ridge) and ridge > 0):
            raise RangeError("sequential.ridge", ridge, "0 < ridge, relative to the diagonal, or null")
        if max_samples < 1:
            raise RangeError("sequential.max_samples", max_samples, "a whole number from 1")
        self.toward = toward
        self.ridge = ridge
        self.max_samples = max_samples

    def options(self) -> dict[str, Any]:
        """What identifies it in reports, as primitives."""
        return {"toward": self.toward, "ridge": self.ridge, "max_samples": self.max_samples}

    @property
    def needs_dense_passes(self) -> bool:
        """Whether what layers get in the dense model counts."""
        return self.toward == "dense_outputs"

    def batches(self, trainer: pl.Trainer, calibration: Calibration) -> CalibrationBatches:
        """The samples that layers are fitted on.

        Raises:
            CalibrationError: there are none.
        """
        return calibration_batches(trainer, calibration, "sequential", self.max_samples)

    def order(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, calibration: Calibration, layers: Iterable[str]
    ) -> list[Stage]:
        """Layers in the order of their calls, those with the same input together; the same on every process."""
        encoder = as_compressible(pl_module).encoder
        model = model_of(pl_module, calibration, "sequential")
        with _as_measured(pl_module):
            return order_of_calls(trainer, encoder, model, self.batches(trainer, calibration), list(layers))

    def fit_(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        calibration: Calibration,
        order: Sequence[Stage],
        work: Work,
    ) -> tuple[dict[str, Record], int]:
        """Factorises layers in their order; every process must call it.

        Args:
            trainer: Of the run.
            pl_module: With the encoder.
            calibration: Which samples.
            order: The layers, as `order` tells them; those before them are factorised already.
            work: What the method does to them.

        Returns:
            A record of each layer, with `apart` where it gets other tokens than in the dense model; the samples.

        Raises:
            CalibrationError: there are no calibration batches.
            NonFiniteError: an activation is NaN or Inf; it names block and layer.
        """
        encoder = as_compressible(pl_module).encoder
        batches = self.batches(trainer, calibration)
        told: dict[str, Record] = {}
        model = model_of(pl_module, calibration, "sequential")
        kept = KeptCalls(trainer, encoder, work.dense, model, order, both=self.needs_dense_passes)
        behind: list[str] = []
        bar = iter(progress(trainer, order, "Block by block", len(order)))
        for _, of_block in groupby(order, lambda stage: stage.block):
            block = list(of_block)
            names = [name for stage in block for name in stage.layers]
            work.begin(names)  # new layers take over modes and flags, which are not their own while a model is measured
            with _as_measured(pl_module):
                for stage in block:
                    next(bar)
                    for part, sums, comparable in self._measure(trainer, encoder, work.dense, stage, kept, batches):
                        told |= self._write(trainer, encoder, part, sums, comparable, work)
                    if behind and not kept.needs_whole_passes:
                        work.leave(behind)
                    behind = []
            work.finish(names, {name: told[name] for name in names})
            behind = names
        next(bar, None)
        return told, batches.num_samples

    def _measure(
        self,
        trainer: pl.Trainer,
        encoder: nn.Module,
        dense: Mapping[str, nn.Module],
        stage: Stage,
        kept: KeptCalls,
        batches: CalibrationBatches,
    ) -> Iterator[tuple[tuple[str, ...], PairedSums, bool]]:
        """Sums for the layers of a stage, once for all of them where they get one tensor on all batches."""
        forms = {name: encoder.get_submodule(name) for name in stage.layers}
        sums = _Sums({name: dense[name] for name in stage.layers}, forms, both=self.needs_dense_passes)
        with Agreement(trainer):
            for mask, passes in kept.of(stage.block, batches):
                sums.add(mask, passes)
        sums.reduce(trainer)
        if sums.differ:
            for name in stage.layers:
                yield from self._measure(trainer, encoder, dense, Stage((name,), stage.block), kept, batches)
            return
        found, comparable = sums.paired(), sums.comparable
        del sums
        check_activations(stage.layers[0], stage.block, found.cross, found.gram)
        yield stage.layers, found, comparable

    def _write(
        self,
        trainer: pl.Trainer,
        encoder: nn.Module,
        names: Sequence[str],
        sums: PairedSums,
        comparable: bool,
        work: Work,
    ) -> dict[str, Record]:
        """Factorises layers with one input, each by its owner, and sends them to all."""
        forms = {name: cast(LowRankLinear, encoder.get_submodule(name)) for name in names}
        own: dict[str, Record] = {}
        with Agreement(trainer):
            # Layers with one input have a bias all of them or, in a few models, not.
            for biased in (False, True):
                mine = [n for n in names if work.owners[n] == trainer.global_rank and _is_biased(forms[n]) == biased]
                if mine:
                    last = biased or not any(map(_is_biased, forms.values()))
                    wanted = compensation(sums if last else _copied(sums), self.ridge, biased)
                    own |= {name: self._write_one(name, forms[name], wanted, work) for name in mine}
        told = {name: record for share in gathered(trainer, own) for name, record in share.items()}
        for name in names:
            for parameter in forms[name].parameters():
                send_(trainer, parameter.data, work.owners[name])
        return {name: told[name] | {"apart": not comparable} for name in names}

    def _write_one(self, name: str, form: LowRankLinear, wanted: Compensation, work: Work) -> Record:
        weight = dense_weight(work.dense[name]).detach()
        found = work.decompose(name, wanted.weight(weight), wanted.moment)
        form.assign_(found.factors.like(form.left.weight))
        product = form.product().detach()
        shift = wanted.shift(weight, product)
        if shift is not None and form.bias is not None:
            form.bias.add_(shift.to(form.bias))
        return {"error": relative_error(weight, product), "weighted_error": found.weighted_error}


def _is_biased(form: LowRankLinear) -> bool:
    return form.bias is not None


def _copied(sums: PairedSums) -> PairedSums:
    return PairedSums(*(None if part is None else part.clone() for part in vars(sums).values()))  # type: ignore[arg-type]


@contextmanager
def _as_measured(pl_module: pl.LightningModule) -> Iterator[None]:
    encoder = as_compressible(pl_module).encoder
    with isolate_rng(), frozen_eval(pl_module), torch.no_grad(), without_cache(encoder):
        yield


class _Sums:
    """`PairedSums` of layers that get one tensor, for as long as they do. Tokens that are padding are left out.

    Args:
        dense: The layers, as they were.
        forms: The same, factorised.
        both: Whether what they get in the dense model counts at all.
    """

    def __init__(self, dense: Mapping[str, nn.Module], forms: Mapping[str, nn.Module], both: bool) -> None:
        self._dense = dense
        self._forms = forms
        self._both = both
        form = cast(LowRankLinear, next(iter(forms.values())))
        n, device = form.in_features, form.left.weight.device
        self._gram = GramSum(n, device)
        self._rest = torch.zeros((n + 2 if both else 0, n), dtype=torch.float64, device=float64_device(device))
        # Tokens; batches on which layers get different tensors; on which models give them other tokens; `Σ ‖x − z‖²`.
        self._counts = torch.zeros(4, dtype=torch.float64, device=float64_device(device))

    @property
    def differ(self) -> bool:
        """Whether the layers have not always had one input."""
        return bool(self._counts[1] > 0)

    @property
    def comparable(self) -> bool:
        """Whether the layers have always had the same tokens in both models."""
        return bool(self._counts[2] == 0)

    def add(self, mask: Tensor | None, passes: Sequence[Pass]) -> None:
        """One pass of the dense model, if that counts, and one of the factorised one, as far as needed."""
        *was, now = passes
        xs = self._inputs(self._dense, was[0]) if self._both else []
        zs = self._inputs(self._forms, now)
        if any(one is not of_model[0] for of_model in (xs, zs) for one in of_model):
            self._counts[1] += 1
            return
        x, z = (xs[0] if xs else None), zs[0]
        if self._both and (x is None or z is None or x.shape != z.shape):
            self._counts[2] += x is not z
            x = None
        if z is None:
            return
        real = unpadded(mask, z)
        kept = ... if real is None else real
        z = z[kept].reshape(-1, z.shape[-1]).float()
        self._gram.add(z)
        self._counts[0] += len(z)
        if x is not None:
            x = x[kept].reshape(z.shape).float()
            sums = torch.cat([x.mT @ z, x.sum(0, keepdim=True), z.sum(0, keepdim=True)])
            self._rest += sums.to(self._rest)
            self._counts[3] += float((x - z).square().sum(dtype=torch.float32))

    def _inputs(self, layers: Mapping[str, nn.Module], run: Pass) -> list[Tensor | None]:
        """What each layer gets in a pass, `None` for one that is not called; the pass ends when all have been."""
        seen: dict[str, Tensor] = {}

        def watching(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
                seen[name] = input_of(args, kwargs)
                if len(seen) == len(layers):
                    raise SeenEnoughError

            return hook

        with ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.callback(layer.register_forward_pre_hook(watching(name), with_kwargs=True).remove)
            with suppress(SeenEnoughError):
                run()
        return [seen.get(name) for name in layers]

    def reduce(self, trainer: pl.Trainer) -> None:
        """Adds up over processes."""
        if trainer.world_size > 1:
            self._gram.total = cast(Tensor, trainer.strategy.reduce(self._gram.total, reduce_op="sum"))
            self._rest = cast(Tensor, trainer.strategy.reduce(self._rest, reduce_op="sum"))
            self._counts = cast(Tensor, trainer.strategy.reduce(self._counts, reduce_op="sum"))

    def paired(self) -> PairedSums:
        """The sums, without those of the dense model where they do not count or cannot be compared."""
        gram = self._gram.matrix()
        if not (self._both and self.comparable):
            return PairedSums(gram, None, gram[0], gram[0], self._counts[0], self._counts[3])
        return PairedSums(gram, self._rest[:-2], self._rest[-2], self._rest[-1], self._counts[0], self._counts[3])
