"""What every compression strategy is, and what it expects of the module that owns it."""

from __future__ import annotations

from abc import ABC
from typing import Protocol, cast

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from lowrank_pl.allocation import Allocation, Measure, Parameters
from lowrank_pl.contract import TargetSpec
from lowrank_pl.errors.run import (
    NothingToCompressError,
    OptimizerCoverageError,
    StrategyPlacementError,
    UnsupportedParallelismError,
)
from lowrank_pl.importance.fisher import Batch
from lowrank_pl.surgery import CompressionRecord, TargetSelector


class Compressible(Protocol):
    """What a strategy may touch of the LightningModule that owns it."""

    encoder: nn.Module
    compression: CompressionRecord | None
    target: TargetSpec | None
    freshly_initialised_head: bool

    def per_sample_losses(self, batch: Batch) -> Tensor:
        """Losses `[b]` of a batch's samples, each as if it were alone."""
        ...


def as_compressible(pl_module: pl.LightningModule) -> Compressible:
    """The same module, typed by what strategies may touch."""
    return cast(Compressible, pl_module)


class CompressionStrategy(pl.Callback, ABC):
    """A compression method as a Lightning callback, given to a task as `model.init_args.strategy`.

    The task returns it from `configure_callbacks`, so its hooks run inside Lightning's loop, before checkpoints
    are written. Shapes change only in `prepare` (before an optimizer exists), values in `on_train_start`, ranks
    during training in `on_train_batch_end` without touching a parameter's shape. A strategy never keeps the
    module it is given.

    Args:
        targets: Which layers to factorise; all linears inside transformer blocks by default.
    """

    def __init__(self, targets: TargetSelector | None = None) -> None:
        self.targets = targets or TargetSelector()
        self.adopted = False  # set by the task that owns it

    @property
    def measure(self) -> Measure:
        """In what the method counts what a layer costs."""
        return Parameters()

    @property
    def at_budget(self) -> bool:
        """Whether the model has the size that was asked for; scores before that do not count as the method's."""
        return True

    def prepare(self, encoder: nn.Module) -> None:
        """Gives the encoder the shapes it will train in. Called once, when no optimizer exists."""

    def plan(self, encoder: nn.Module) -> Allocation | None:
        """What the strategy would do to the encoder, where that is known without data; changes nothing."""
        del encoder
        return None

    def check(self, encoder: nn.Module) -> None:
        """Refuses what `compress` could not do to an encoder, before any long work; changes nothing.

        Raises:
            NothingToCompressError: the method exists only as part of a training run, or does nothing.
        """
        del encoder
        raise NothingToCompressError(type(self).__name__)

    def compress(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compresses the module's encoder at once, without training it.

        Raises:
            NothingToCompressError: the method exists only as part of a training run, or does nothing.
        """
        del trainer, pl_module
        raise NothingToCompressError(type(self).__name__)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses a wrong place in the configuration and parallelism that shards parameters.

        Raises:
            StrategyPlacementError: it stands under `trainer.callbacks`.
            UnsupportedParallelismError: the trainer uses neither a single device nor DDP.
        """
        if getattr(pl_module, "strategy", None) is not self:
            raise StrategyPlacementError(type(self).__name__)
        if stage == "fit" and not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise UnsupportedParallelismError(type(self).__name__, type(trainer.strategy).__name__)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses an optimizer that lacks trainable parameters.

        Raises:
            OptimizerCoverageError: some parameters would silently never be trained.
        """
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in pl_module.named_parameters() if p.requires_grad and id(p) not in held]
        if missing:
            raise OptimizerCoverageError(missing)
