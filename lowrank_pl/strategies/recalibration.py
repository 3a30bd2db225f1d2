"""A head brought back to the outputs that the dense model gave."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lowrank_pl.contract import CalibrationBatches
from lowrank_pl.core.recalibration import match_distributions, match_values
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import FewSamplesError
from lowrank_pl.errors.targets import HeadError
from lowrank_pl.importance.frozen import frozen_eval
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.strategies.calibration import Calibration, calibration_batches
from lowrank_pl.strategies.kept_calls import model_of
from lowrank_pl.strategies.outputs import outputs_of
from lowrank_pl.strategies.padding import attention_mask, unpadded
from lowrank_pl.strategies.processes import Agreement, gathered
from lowrank_pl.surgery.head import find_head, scale_outputs_

logger = logging.getLogger(__name__)

_NAME = "recalibration"
_MOST_OUTPUTS = 1000
"""More is a vocabulary: its outputs on thousands of tokens would not fit into memory."""


class Recalibration:
    """One scale and one bias per output of the encoder's head, fitted so that outputs are close to the dense model's.

    Factorised models grow too sure of themselves or not sure enough: their scores stay where their losses rise. For
    classes the divergence of the predicted distributions is minimised, for values the squared difference, on (some of)
    the calibration samples. No labels are used, and with `calibration.labels: sampled` none are read. The result is
    folded into the weights of the head.

    Args:
        max_samples: How many of the calibration samples are used at most.
        values: Whether outputs are values, or logits of labels that do not exclude each other: each is then matched by
            itself. By default several outputs are the classes of one distribution, and a single one is a value.
    """

    def __init__(self, max_samples: int = 2048, values: bool | None = None) -> None:
        if max_samples < 1:
            raise RangeError("recalibration.max_samples", max_samples, "a whole number from 1")
        self.max_samples = max_samples
        self.values = values

    def options(self) -> dict[str, Any]:
        """What identifies it in reports, as primitives."""
        return {"max_samples": self.max_samples, **({} if self.values is None else {"values": self.values})}

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, calibration: Calibration) -> None:
        """Looks at the head on one batch, before any work.

        Raises:
            HeadError: it cannot be recalibrated.
            CalibrationError: there are no calibration batches.
            FewSamplesError: there are fewer samples than processes.
        """
        batches = calibration_batches(trainer, calibration, _NAME, self.max_samples)
        if batches.num_samples < trainer.world_size:
            raise FewSamplesError(_NAME, batches.num_samples, trainer.world_size)
        encoder = as_compressible(pl_module).encoder
        run = self._run(trainer, pl_module, calibration, batches)
        with isolate_rng(), torch.no_grad(), frozen_eval(pl_module):
            _check_number(encoder, outputs_of(pl_module, run))
            find_head(encoder, lambda: outputs_of(pl_module, run))

    def outputs(self, trainer: pl.Trainer, pl_module: pl.LightningModule, calibration: Calibration) -> Tensor:
        """The encoder's outputs `[d, k]` on this process's samples, tokens that are padding left out; on the CPU.

        Raises:
            HeadError: see `outputs_of`; or there are more outputs than a head for classes has.
            CalibrationError: there are no calibration batches.
            LabelsError: they have no labels, and none are drawn: the passes are those of losses.
        """
        module = as_compressible(pl_module)
        batches = calibration_batches(trainer, calibration, _NAME, self.max_samples)
        model, found = model_of(pl_module, calibration, _NAME), []
        with Agreement(trainer), isolate_rng(), torch.no_grad(), frozen_eval(pl_module):
            for batch in batches:
                there = trainer.strategy.batch_to_device(batch, trainer.strategy.root_device)
                outputs = outputs_of(pl_module, partial(model, there)).float()
                mask = attention_mask(module.encoder, partial(model, there), there)
                real = unpadded(mask, outputs)
                outputs = outputs.flatten(0, -2) if real is None else outputs[real]
                _check_number(module.encoder, outputs)
                found.append(outputs.cpu())
        return torch.cat(found)

    def fit_(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, calibration: Calibration, reference: Tensor
    ) -> str:
        """Changes the head in place; every process must call it, and all get the same head.

        Args:
            trainer: Of the run.
            pl_module: With the factorised encoder.
            calibration: As for `outputs`.
            reference: What `outputs` returned for the dense encoder.

        Returns:
            What was done, for the report.
        """
        module = as_compressible(pl_module)
        batches = calibration_batches(trainer, calibration, _NAME, self.max_samples)
        run = self._run(trainer, pl_module, calibration, batches)
        with isolate_rng(), torch.no_grad(), frozen_eval(pl_module):
            head = find_head(module.encoder, lambda: outputs_of(pl_module, run))
        own = self.outputs(trainer, pl_module, calibration)
        outputs, wanted = (torch.cat(gathered(trainer, part)) for part in (own, reference))
        values = outputs.shape[1] == 1 if self.values is None else self.values
        with Agreement(trainer):
            scale, bias = (match_values if values else match_distributions)(outputs, wanted)
            scale_outputs_(head, scale, bias)
        told = f"the head was recalibrated on {len(outputs)} outputs: scales {_span(scale)}, biases {_span(bias)}"
        logger.info(told)
        return told

    @staticmethod
    def _run(
        trainer: pl.Trainer, pl_module: pl.LightningModule, calibration: Calibration, batches: CalibrationBatches
    ) -> Callable[[], object]:
        """Runs the module on the first batch."""
        first = trainer.strategy.batch_to_device(next(iter(batches)), trainer.strategy.root_device)
        return partial(model_of(pl_module, calibration, _NAME), first)


def _check_number(encoder: nn.Module, outputs: Tensor) -> None:
    if outputs.shape[-1] > _MOST_OUTPUTS:
        problem = f"it has {outputs.shape[-1]:,} outputs, more than {_MOST_OUTPUTS:,}"
        raise HeadError(type(encoder).__name__, problem)


def _span(values: Tensor) -> str:
    return f"{float(values.min()):.3g} to {float(values.max()):.3g}"
