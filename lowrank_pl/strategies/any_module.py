"""Compression of a module that nobody trains here: no LightningModule, no datamodule, no run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.run import NotFactorisedError
from lowrank_pl.errors.targets import SeveralDevicesError
from lowrank_pl.importance.batches import Batch
from lowrank_pl.strategies.base import CompressionStrategy, as_compressible
from lowrank_pl.strategies.kept_batches import KeptBatches
from lowrank_pl.surgery import CompressionRecord, read_layout
from lowrank_pl.surgery.record import DENSE

M = TypeVar("M", bound=nn.Module)


def compress(
    model: M,
    batches: Iterable[Batch] | None,
    loss: Callable[[M, Batch], Tensor] | None,
    strategy: CompressionStrategy,
) -> CompressionRecord:
    """Factorises layers of any module, in place, without training it.

    The model is measured in eval mode and keeps the modes of its parts; random states are as before afterwards. Layers
    that are exchanged have new parameters: make the optimizer of a further training after it. No process group is used.

    Args:
        model: On one device, with its head. By default `strategy.targets` takes the linears below an `nn.ModuleList`.
        batches: What `loss` takes, e.g. a `DataLoader`: read once and kept in memory, so give as many as are to be
            measured on, a few thousand samples at most. Tensors have the samples along their first dimension, and are
            moved to the model's device. `None` for methods that look at the weights alone.
        loss: `loss(model, batch)` gives the losses `[b]` of the samples, each as if it were alone (`reduction="none"`).
            `None` as above.
        strategy: A static method, such as `KroneckerSVD(keep_ratio=0.33)`. Its `calibration` counts: results are cached
            on disk unless it says `cache=False`.

    Returns:
        What was done to each targeted layer, with ranks and errors.

    Raises:
        NothingToCompressError: the strategy works only in training.
        CalibrationError, MissingArgumentError: it needs batches, or a loss.
        BatchShapeError, LossShapeError: batches, or losses, are not one per sample.
        SeveralDevicesError: the model lies on several devices.
        LowRankError: whatever else the strategy raises; then nothing has been changed.
    """
    devices = {parameter.device for parameter in model.parameters()} or {torch.device("cpu")}
    if len(devices) > 1:
        raise SeveralDevicesError(type(model).__name__, sorted(map(str, devices)))
    # Factors that were made in inference mode could never be trained.
    with isolate_rng(), torch.inference_mode(False), torch.enable_grad():
        trainer = _trainer(devices.pop())
        if batches is not None:
            setattr(trainer, "datamodule", KeptBatches(batches))  # noqa: B010, in place of a LightningDataModule
        module = _Owner(model, loss)
        module.trainer = trainer
        strategy.compress(trainer, module)
    record = as_compressible(module).compression
    assert record is not None
    check_factorised(model, record)
    return record


def check_factorised(encoder: nn.Module, record: CompressionRecord | None) -> None:
    """Raises `NotFactorisedError` if a layer that a record calls factorised is not."""
    if record is None:
        return
    layout = read_layout(encoder).modules
    if missing := [layer.name for layer in record.layers if layer.kind != DENSE and layer.name not in layout]:
        raise NotFactorisedError(record.method, missing)


class _Owner(pl.LightningModule):
    """What a strategy expects around a model.

    Args:
        model: The model.
        loss: Of the model and a batch.
    """

    def __init__(self, model: Any, loss: Callable[[Any, Batch], Tensor] | None) -> None:
        super().__init__()
        self.encoder = model
        self.loss = loss
        # What a bound method's object holds is part of the loss, for the cache.
        self.owner_of_loss = getattr(loss, "__self__", None)

    def per_sample_losses(self, batch: Batch) -> Tensor:
        """What the loss gives."""
        if self.loss is None:
            raise MissingArgumentError("the loss", "Give loss(model, batch), which returns one loss per sample.")
        return self.loss(self.encoder, batch)


def _trainer(device: torch.device) -> pl.Trainer:
    """A trainer that runs nothing: it tells strategies of one process on one device."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    with _quiet():
        return pl.Trainer(
            accelerator=device.type,
            devices=[index] if device.type == "cuda" else 1,
            plugins=[LightningEnvironment()],  # whatever cluster this process is started on
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Mutes what Lightning says of the devices that it finds."""
    talker = logging.getLogger("lightning.pytorch")
    before = talker.level
    talker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        talker.setLevel(before)
