"""Measuring the Fisher information inside a Lightning run: data, devices, processes, cache, progress."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from tqdm.auto import tqdm

from lowrank_pl.contract import CalibrationBatches, CalibrationSource
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import CalibrationError
from lowrank_pl.importance import Fisher, FisherCache, FisherKind, empirical_fisher
from lowrank_pl.importance.fisher import Batch
from lowrank_pl.strategies.base import as_compressible
from lowrank_pl.surgery import swapped

logger = logging.getLogger(__name__)


@dataclass
class Calibration:
    """How importance is measured on the training data.

    Args:
        batch_size: Samples per forward and backward pass; changes speed and memory, not the result.
        max_samples: Use a seeded random choice of so many samples; `null` uses all.
        seed: Seed of that choice.
        cache: Keep results on disk, keyed by the model's weights and the data, and reuse them.
        cache_dir: Where; by default `fisher` below `$LOWRANK_PL_CACHE`, or below `~/.cache/lowrank_pl`.
    """

    batch_size: int = 32
    max_samples: int | None = None
    seed: int = 0
    cache: bool = True
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        """Refuses numbers below 1."""
        for name in ("batch_size", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RangeError(f"calibration.{name}", value, "a whole number from 1")

    def folder(self) -> Path:
        """The folder of the cache."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("LOWRANK_PL_CACHE", "~/.cache/lowrank_pl")).expanduser() / "fisher"


def measure_fisher(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    originals: Mapping[str, nn.Linear],
    kind: FisherKind,
    options: Calibration,
    asked_by: str,
) -> Fisher:
    """Measures the Fisher information of the dense layers that factorised ones stand in for.

    Every process measures its share of the samples; one all-reduce adds them up. The dense layers are back in
    the tree for the length of the measurement, so it is the original model that is differentiated. Random
    states are as before afterwards.

    Raises:
        CalibrationError: there is no datamodule that hands out calibration batches, or no sample in it.
        NonFiniteError: a loss or gradient is NaN or Inf.
    """
    module = as_compressible(pl_module)
    batches = _batches(trainer, options, asked_by)
    cache = FisherCache(options.folder()) if options.cache else None
    with isolate_rng(), swapped(module.encoder, originals):
        key, cached = "", None
        if cache is not None and trainer.is_global_zero:
            loss = f"{type(pl_module).__module__}.{type(pl_module).__qualname__} {module.target}"
            key = FisherCache.key(module.encoder, list(originals), kind, batches.fingerprint, loss)
            cached = cache.load(key, pl_module.device)
        # Only the first process factorises, so only its cache counts.
        if trainer.strategy.broadcast(cached is not None):
            logger.info("Fisher information of %d layers read from the cache", len(originals))
            return cached if cached is not None else Fisher({}, batches.num_samples)
        fisher = empirical_fisher(
            module.encoder,
            originals,
            _on_device(trainer, pl_module, batches),
            module.per_sample_losses,
            kind,
            lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum"),
        )
    if cache is not None and trainer.is_global_zero:
        cache.save(key, fisher)
    return fisher


def progress(trainer: pl.Trainer, items: Any, description: str, total: int) -> Any:
    """A progress bar on the first process, unless the trainer's own is switched off."""
    return tqdm(
        items,
        desc=description,
        total=total,
        disable=not trainer.is_global_zero or trainer.progress_bar_callback is None,
    )


def _batches(trainer: pl.Trainer, options: Calibration, asked_by: str) -> CalibrationBatches:
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, CalibrationSource):
        given = "no datamodule was given" if datamodule is None else f"{type(datamodule).__name__} has none"
        raise CalibrationError(asked_by, given)
    batches = datamodule.calibration_batches(
        options.batch_size, options.max_samples, options.seed, trainer.global_rank, trainer.world_size
    )
    if batches.num_samples == 0:
        raise CalibrationError(asked_by, "the training split is empty")
    return batches


def _on_device(trainer: pl.Trainer, pl_module: pl.LightningModule, batches: CalibrationBatches) -> Iterator[Batch]:
    for batch in progress(trainer, batches, "Fisher information", len(batches)):
        yield trainer.strategy.batch_to_device(batch, pl_module.device)
