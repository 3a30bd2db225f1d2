"""Factors brought back to the outputs of the dense layers, on inputs that the factorised model really gives.

m: out_features, n: in_features, r: rank.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lowrank_pl.core import Factors, refit_left, relative_error
from lowrank_pl.core.precision import double, float64_device
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.importance.frozen import frozen_eval
from lowrank_pl.nn import LowRankLinear, dense_weight, input_of
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.strategies.calibration import Calibration, calibration_batches
from lowrank_pl.strategies.kept_calls import (
    KeptCalls,
    Pass,
    check_activations,
    model_of,
    order_of_calls,
    without_cache,
)
from lowrank_pl.strategies.padding import unpadded
from lowrank_pl.strategies.processes import Agreement, progress, send_
from lowrank_pl.strategies.replay import SeenEnoughError

logger = logging.getLogger(__name__)


class Refit:
    """Fits left factors and biases anew when all layers are factorised, by least squares.

    Each layer is factorised for the inputs that the dense model gives it; in the factorised model the layers before it
    have changed them. Layer by layer, in the order in which they are called, the right factor is kept, and left factor
    and bias are chosen so that the layer puts out, from what it gets now, what the dense layer puts out from what it
    gets in the dense model, on the calibration samples. To fit all layers at once does not work: each changes what
    those after it get. For the same reason layers that are called several times in a pass stay as they are. A look-up
    always gets the same tokens: its factors are the least-squares fit to them as they come out of the decomposition.

    Args:
        max_samples: How many of the calibration samples are used at most. What a block is called with is kept for all
            of them while its layers are fitted; then they go on to the next block.
    """

    def __init__(self, max_samples: int = 512) -> None:
        if max_samples < 1:
            raise RangeError("refit.max_samples", max_samples, "a whole number from 1")
        self.max_samples = max_samples

    def options(self) -> dict[str, Any]:
        """What identifies it in reports, as primitives."""
        return {"max_samples": self.max_samples}

    def fit_(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        calibration: Calibration,
        dense: Mapping[str, nn.Module],
        linears: Iterable[str] | None = None,
    ) -> str:
        """Changes the factors in place; every process must call it, and all get the same.

        Args:
            trainer: Of the run.
            pl_module: With the factorised encoder.
            calibration: Which samples.
            dense: The layers that the factorised ones stand for, by name.
            linears: Which of them are fitted; all by default. The others are only part of the model around them.

        Returns:
            What was done, for the report.

        Raises:
            CalibrationError: there are no calibration batches.
            NonFiniteError: an activation is NaN or Inf; it names block and layer.
        """
        encoder = as_compressible(pl_module).encoder
        forms = {name: cast(LowRankLinear, encoder.get_submodule(name)) for name in linears or dense}
        batches = calibration_batches(trainer, calibration, "refit", self.max_samples)
        model = model_of(pl_module, calibration, "refit")
        with isolate_rng(), frozen_eval(pl_module), torch.no_grad(), without_cache(encoder):
            order = order_of_calls(trainer, encoder, model, batches, list(forms))
            kept = KeptCalls(trainer, encoder, dense, model, order)
            fitted = 0
            for stage in progress(trainer, order, "Refit", len(order)):
                names = stage.layers
                sums = _Sums({n: dense[n] for n in names}, {n: forms[n] for n in names})
                with Agreement(trainer):
                    for mask, (was, now) in kept.of(stage.block, batches):
                        with sums:
                            sums.add(mask, was, now)
                for name in names:
                    cross, gram = sums.found[name]
                    if trainer.world_size > 1:
                        cross, gram = (trainer.strategy.reduce(part, reduce_op="sum") for part in (cross, gram))
                    if bool(gram.isinf().all()):  # on all processes; an activation that is Inf leaves other entries
                        continue
                    check_activations(name, stage.block, cross, gram)
                    fitted += 1
                    with Agreement(trainer):
                        _write_(dense_weight(dense[name]).detach(), forms[name], cross, gram)
                    for parameter in forms[name].parameters():
                        send_(trainer, parameter.data, 0)
        told = f"left factors and biases of {fitted} layers were refitted on {batches.num_samples} samples"
        if fitted < len(forms):
            told += f"; {len(forms) - fitted} that are called several times, never, or for other tokens were not"
        logger.log(logging.INFO if fitted else logging.WARNING, told)
        return told


def refitted_errors(dense: nn.Module, form: nn.Module) -> dict[str, Any]:
    """What the record of a layer tells anew; its weighted norm is not what was minimised last."""
    product = cast(LowRankLinear, form).product().detach()
    return {"error": relative_error(dense_weight(dense).detach(), product), "weighted_error": None}


def _write_(weight: Tensor, form: LowRankLinear, cross: Tensor, gram: Tensor) -> None:
    left, right, bias = form.left.weight, form.right.weight, form.bias
    start = double(left)
    if bias is not None:
        start = torch.cat([start, start.new_zeros(len(start), 1)], 1)
    found = refit_left(weight, start, cross, gram)
    form.assign_(Factors.from_product(found[:, : form.rank], double(right)).like(left))
    if bias is not None:
        bias.add_(found[:, -1].to(bias))


class _Sums:
    """`Σ x zᵀ` and `Σ z zᵀ` of layers: `x` what each gets in the dense model, `z` what its right factor puts out now.

    Where a layer has a bias, `z` has a constant 1 behind it. Tokens that are padding are left out. A context manager,
    whose block holds the hooks in the layers.

    Args:
        dense: The layers to look at, as they were.
        forms: The same, factorised.
    """

    def __init__(self, dense: Mapping[str, nn.Module], forms: Mapping[str, LowRankLinear]) -> None:
        self._dense = dense
        self._forms = forms
        self._seen: dict[str, Tensor] = {}
        self._hooks = ExitStack()
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, form in forms.items():
            width = form.rank + (form.bias is not None)
            device = float64_device(form.left.weight.device)
            sizes = ((form.in_features, width), (width, width))
            cross, gram = (torch.zeros(size, dtype=torch.float64, device=device) for size in sizes)
            self.found[name] = (cross, gram)

    def __enter__(self) -> _Sums:
        for name, form in self._forms.items():
            for handle in (
                self._dense[name].register_forward_hook(self._watching(name, of_output=False), with_kwargs=True),
                form.right.register_forward_hook(self._watching(name, of_output=True), with_kwargs=True),
            ):
                self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def add(self, mask: Tensor | None, was: Pass, now: Pass) -> None:
        """One pass of the dense model and one of the factorised one, as far as needed."""
        xs, zs = self._pass(was), self._pass(now)
        for name in self._forms:
            if (name in xs) != (name in zs) or (name in xs and xs[name].shape[:-1] != zs[name].shape[:-1]):
                # The models send other tokens here, which cannot be told apart: infinity reaches all processes.
                self.found[name][1].fill_(torch.inf)
            elif name in xs:
                self._add(name, xs[name], zs[name], mask)

    def _pass(self, run: Pass) -> dict[str, Tensor]:
        self._seen = {}
        with suppress(SeenEnoughError):
            run()
        return self._seen

    def _watching(self, name: str, of_output: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self._seen[name] = output if of_output else input_of(args, kwargs)
            if len(self._seen) == len(self._forms):
                raise SeenEnoughError

        return hook

    def _add(self, name: str, x: Tensor, z: Tensor, mask: Tensor | None) -> None:
        kept = unpadded(mask, x)
        if kept is not None:
            x, z = x[kept], z[kept]
        x, z = x.flatten(0, -2).float(), z.flatten(0, -2).float()
        if self._forms[name].bias is not None:
            z = torch.cat([z, z.new_ones(len(z), 1)], 1)
        cross, gram = self.found[name]
        cross += (x.mT @ z).to(cross)
        gram += (z.mT @ z).to(gram)
