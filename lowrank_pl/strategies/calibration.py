"""Measuring importance inside a Lightning run: data, devices, processes, cache, progress."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lowrank_pl.contract import CalibrationBatches, CalibrationSource
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import CalibrationError
from lowrank_pl.importance import Importance, ImportanceCache, LayerImportance, Measured, identity, settings, values
from lowrank_pl.importance.batches import Batch
from lowrank_pl.importance.frozen import frozen_eval
from lowrank_pl.strategies.base import ABOUT_COMPRESSION, as_compressible
from lowrank_pl.strategies.labels import LABELS, Labels, ObservedLabels, SampledLabels, check_labels
from lowrank_pl.strategies.processes import Agreement, progress, send_

logger = logging.getLogger(__name__)

_DEFAULT_BATCH_SIZE = 32
T = TypeVar("T", bound=LayerImportance)


@dataclass
class Calibration:
    """How importance is measured on the training data.

    Passes run in the dtype of the model's weights, not under the trainer's autocast: float32 for the mixed precisions,
    half precision for the true ones, in float16 with a scaled loss, so that small gradients do not vanish. Under
    autocast to bfloat16 the importance of a weight is off by 0.5 % in the median and of an input by up to 30 % (tiny
    encoders, 32 samples). Memory that is too short is met by smaller batches instead.

    Args:
        batch_size: Samples per forward and backward pass; changes speed and memory, not the result. By default what the
            data train with, or 32 where they do not say. A batch that does not fit into memory is halved, and so are
            those after it.
        max_samples: Use a seeded random choice of so many samples; `null` uses all.
        seed: Seed of that choice.
        cache: Keep results on disk and reuse them. They are keyed by the data, by the model's weights, configuration
            and code, and by the code and settings of the task, whose loss it is: in doubt, it is measured anew.
        cache_dir: Where; by default `importance` below `$LOWRANK_PL_CACHE`, or below `~/.cache/lowrank_pl`.
        max_memory: What the measured tensors of the layers may take at once, in GiB; layers are then measured in
            groups, with passes over the data for each. `null`: all together.
        labels: At which labels gradients are measured: the `observed` ones of the data, which give the empirical Fisher
            information, or labels `sampled` from what the model predicts, which give the true one and need none in the
            data, at one more forward pass per batch. A metric without gradients is KroneckerSVD's side `input`.
    """

    choices_told: ClassVar[Mapping[str, str]] = {
        "labels": "'observed' are the labels of the data, 'sampled' are drawn from what the model predicts and need "
        "none there. 'none', no gradients at labels, is a choice of the metric: KroneckerSVD with side 'input'."
    }
    """What the command line tells of an argument besides the words that are allowed."""

    batch_size: int | None = None
    max_samples: int | None = None
    seed: int = 0
    cache: bool = True
    cache_dir: str | None = None
    max_memory: float | None = None
    labels: Labels = "observed"

    def __post_init__(self) -> None:
        """Raises an error for numbers below 1, and labels that are no choice."""
        if self.labels not in LABELS:
            told = self.choices_told["labels"].rstrip(".")
            raise RangeError("calibration.labels", self.labels, f"'observed' or 'sampled'. {told}")
        for name in ("batch_size", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RangeError(f"calibration.{name}", value, "a whole number from 1")
        if self.max_memory is not None and not self.max_memory > 0:
            raise RangeError("calibration.max_memory", self.max_memory, "a number of GiB above 0, or null for no bound")

    def folder(self) -> Path:
        """The folder of the cache."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("LOWRANK_PL_CACHE", "~/.cache/lowrank_pl")).expanduser() / "importance"


def measure_importance(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    layers: Mapping[str, nn.Module],
    importance: Importance[T],
    options: Calibration,
    asked_by: str,
) -> Measured[T]:
    """Measures dense layers of the module's encoder on the calibration samples.

    Every process measures its share of the samples, in batches as large as its own memory allows; sums over processes
    bring them together, and every process has the result, also where the first finds it in its cache. Random states are
    as before afterwards.

    Raises:
        CalibrationError: there is no datamodule that hands out calibration batches, or no sample in it.
        NotCompressibleError: the module has no `per_sample_losses`.
        BatchShapeError, LossShapeError: batches, or losses, are not one per sample.
        LabelsError: the samples have no labels, or labels were to be drawn for a task that cannot.
        NonFiniteError: a loss or gradient is NaN or Inf.
    """
    module = as_compressible(pl_module)
    batches = check_calibration(trainer, pl_module, options, asked_by)
    cache = ImportanceCache(options.folder()) if options.cache else None
    device = trainer.strategy.root_device
    what = type(importance).__name__
    with isolate_rng(), frozen_eval(pl_module):  # also what is outside of the encoder, such as a norm before it
        key, cached = "", None
        with Agreement(trainer):
            if cache is not None and trainer.is_global_zero:
                loss = loss_identity(trainer, pl_module)
                kind = importance.key() + _key_of_labels(trainer, options)
                key = ImportanceCache.key(module.encoder, list(layers), kind, batches.fingerprint, loss)
                cached = cache.load(key, device, importance)
        # The first process's cache counts: another machine may have none.
        if trainer.strategy.broadcast(cached is not None):
            logger.info("%s of %d layers read from the cache", what, len(layers))
            return _sent(trainer, cached, importance)
        with Agreement(trainer) as agreement:
            settled = False

            def reduce_sum(tensor: Tensor) -> Tensor:
                nonlocal settled
                if not settled:
                    agreement.settle()
                    settled = True
                return trainer.strategy.reduce(tensor, reduce_op="sum")

            # Lightning may build models under a default device that is not the one of batches and generators.
            with torch.device("cpu"):
                measured = importance.measure(
                    module.encoder,
                    layers,
                    _labelled(trainer, pl_module, batches, options, what),
                    module.per_sample_losses,
                    reduce_sum if trainer.world_size > 1 else None,
                    math.ceil(batches.num_samples / trainer.world_size),
                )
    if cache is not None and trainer.is_global_zero:
        try:
            cache.save(key, measured)
        except OSError as error:
            logger.warning("%s is not kept: %s cannot be written (%s)", what, cache.folder, error)
    return measured


def check_calibration(
    trainer: pl.Trainer, pl_module: pl.LightningModule, options: Calibration, asked_by: str
) -> CalibrationBatches:
    """The samples that are measured on.

    Raises:
        CalibrationError, NotCompressibleError, LabelsError: see `measure_importance`.
    """
    as_compressible(pl_module, asked_by, "per_sample_losses")
    check_labels(pl_module, options.labels)
    return calibration_batches(trainer, options, asked_by)


def _key_of_labels(trainer: pl.Trainer, options: Calibration) -> str:
    """What the labels depend on: nothing but the data, unless they are drawn, by each process for its own samples."""
    return "" if options.labels == "observed" else f" labels {options.labels} {options.seed} {trainer.world_size}"


def _labelled(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batches: CalibrationBatches, options: Calibration, what: str
) -> Iterable[Batch]:
    """The batches on the device of the run, with the labels that were asked for."""
    on_device = BatchesOnDevice(trainer, batches, what)
    if options.labels == "observed":
        return ObservedLabels(pl_module, on_device)
    return SampledLabels(pl_module, on_device, options.seed, trainer.global_rank)


class BatchesOnDevice:
    """Calibration batches on the device of the run, with a progress bar; may be gone through again."""

    def __init__(self, trainer: pl.Trainer, batches: CalibrationBatches, description: str) -> None:
        self._trainer = trainer
        self._batches = batches
        self._description = description

    def __iter__(self) -> Iterator[Batch]:
        """Yields what the module's `per_sample_losses` takes."""
        parallelism = self._trainer.strategy
        for batch in progress(self._trainer, self._batches, self._description, len(self._batches)):
            yield parallelism.batch_to_device(batch, parallelism.root_device)


def loss_identity(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    """Identifies what the losses depend on besides the encoder: code and settings of the module, and the precision.

    What is known not to matter is left out: what every LightningModule has, what is about compression, and what the
    module's class names in `apart_from_losses`.
    """
    module = as_compressible(pl_module)
    apart = {*vars(pl.LightningModule()), *ABOUT_COMPRESSION, *getattr(module, "apart_from_losses", ())}
    held = {**settings(pl_module), **values(pl_module, recurse=False)}
    own = {name: value for name, value in held.items() if name not in apart}
    parts = {name: part for name, part in pl_module.named_children() if part is not module.encoder}
    precision = (trainer.precision, torch.get_float32_matmul_precision())
    return identity(type(pl_module), own, parts, str(module.target), precision)


def _sent(trainer: pl.Trainer, measured: Measured[T] | None, importance: Importance[T]) -> Measured[T]:
    """What the first process has read, on every process; tensors that layers share stay shared."""
    if trainer.world_size == 1:
        assert measured is not None
        return measured
    tensors: dict[int, Tensor] = {}
    places: dict[str, dict[str, int]] = {}
    if measured is not None:
        for name, layer in measured.layers.items():
            places[name] = {part: id(tensor) for part, tensor in layer.tensors().items()}
            tensors |= {id(tensor): tensor for tensor in layer.tensors().values()}
    told = {place: (tuple(tensor.shape), tensor.dtype) for place, tensor in tensors.items()}
    samples = 0 if measured is None else measured.num_samples
    told, places, samples = trainer.strategy.broadcast((told, places, samples))
    device = trainer.strategy.root_device
    for place, (shape, dtype) in told.items():
        if place not in tensors:
            tensors[place] = torch.empty(shape, dtype=dtype, device=device)
        send_(trainer, tensors[place], 0)
    layers = {
        name: importance.layer({part: tensors[place] for part, place in parts.items()})
        for name, parts in places.items()
    }
    return Measured(layers, samples)


def calibration_batches(
    trainer: pl.Trainer, options: Calibration, asked_by: str, at_most: int | None = None
) -> CalibrationBatches:
    """The calibration samples of this process.

    Args:
        trainer: Whose datamodule has them.
        options: Which samples, in which batches.
        asked_by: Who needs them, for messages.
        at_most: Samples over all processes, where fewer than the options say are enough.

    Raises:
        CalibrationError: there is no datamodule that hands them out, or no sample in it.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, CalibrationSource):
        given = "no datamodule was given" if datamodule is None else f"{type(datamodule).__name__} has none"
        raise CalibrationError(asked_by, given)
    batch_size = options.batch_size or _training_batch_size(datamodule)
    place = (trainer.global_rank, trainer.world_size)
    limits = [limit for limit in (options.max_samples, at_most) if limit is not None]
    with torch.device("cpu"):
        batches = datamodule.calibration_batches(batch_size, min(limits, default=None), options.seed, *place)
    if batches.num_samples == 0:
        raise CalibrationError(asked_by, "the training split is empty")
    return batches


def _training_batch_size(datamodule: Any) -> int:
    """What the data train with: `batch_size`, or that of `hparams`, where Lightning's tuner looks too."""
    given = getattr(datamodule, "batch_size", None) or getattr(datamodule, "hparams", {}).get("batch_size")
    return given if isinstance(given, int) and given >= 1 else _DEFAULT_BATCH_SIZE
