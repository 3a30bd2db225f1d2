"""What every compression strategy is, and what it expects of the module that owns it."""

from __future__ import annotations

from abc import ABC
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast
from uuid import uuid4

import lightning.pytorch as pl
from torch import Tensor, nn

from lowrank_pl.allocation import Allocation, Measure, Parameters
from lowrank_pl.contract import TargetSpec
from lowrank_pl.errors.budget import NoTrainingStepError
from lowrank_pl.errors.optimizer import OptimizerCoverageError
from lowrank_pl.errors.run import EmbeddingsError, NotCompressibleError, NothingToCompressError, StrategyPlacementError
from lowrank_pl.importance.batches import Batch
from lowrank_pl.strategies.placing import build, check_nothing_comes_before
from lowrank_pl.strategies.processes import check_parallelism
from lowrank_pl.surgery import CompressionRecord, ModelLayout, TargetSelector


class Compressible(Protocol):
    """What a strategy may touch of the LightningModule that it compresses.

    A module brings `encoder` and, for methods that measure, `per_sample_losses`; the rest has the default that
    `as_compressible` gives it.

    Attributes:
        encoder: What is compressed, head included; in place before `setup` of the callbacks, or made by the module's
            `configure_model`.
        compression: What was done to the encoder; strategies write it. `None` by default.
        target: What is predicted, if somebody is to know; `None` by default.
        freshly_initialised_head: Whether the encoder has not learned its task yet; `False` by default.
        prepared_by: Which strategy has prepared the encoder; strategies write it. `None` by default.
    """

    encoder: nn.Module
    compression: CompressionRecord | None
    target: TargetSpec | None
    freshly_initialised_head: bool
    prepared_by: str | None

    @property
    def layout_to_resume(self) -> ModelLayout | None:
        """The layout of the checkpoint that the coming `fit` resumes; `None`, the default, for a new run."""
        ...

    def per_sample_losses(self, batch: Batch) -> Tensor:
        """Losses `[b]` of a batch's samples, each as if it were alone."""
        ...


_DEFAULTS: dict[str, Any] = {
    "compression": None,
    "target": None,
    "freshly_initialised_head": False,
    "prepared_by": None,
    "layout_to_resume": None,
}
_NOT_BY_ITSELF = "the module does not divide its encoder among processes once the layers have their shapes"
ABOUT_COMPRESSION = ("strategy", *_DEFAULTS)
"""Attributes of a `Compressible` that are about its compression: no loss depends on them."""


def as_compressible(pl_module: pl.LightningModule, asked_by: str = "", needs: str = "") -> Compressible:
    """The same module, typed by what strategies may touch; attributes that it lacks are set to their defaults.

    Args:
        pl_module: The module.
        asked_by: Who needs the attribute, for the message.
        needs: An attribute without default, `encoder` or `per_sample_losses`, that has to be there.

    Raises:
        NotCompressibleError: the module does not have it.
    """
    for name, value in _DEFAULTS.items():
        # Not hasattr, which would compute properties.
        if name not in vars(pl_module) and not hasattr(type(pl_module), name):
            setattr(pl_module, name, value)
    if needs and not hasattr(pl_module, needs):
        raise NotCompressibleError(type(pl_module).__name__, asked_by, needs)
    return cast(Compressible, pl_module)


def strategy_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> CompressionStrategy | None:
    """The strategy that a module owns or, where it owns none, that the trainer has among its callbacks."""
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks")  # noqa: B009, set without a type
    own = getattr(pl_module, "strategy", None)
    candidates = [own] if own is not None else callbacks
    return next((found for found in candidates if isinstance(found, CompressionStrategy)), None)


class CompressionStrategy(pl.Callback, ABC):
    """A compression method as a Lightning callback, given to a task as `model.init_args.strategy`.

    The task returns it from `configure_callbacks`, so its hooks run inside Lightning's loop, before checkpoints
    are written. Shapes change only in `prepare` (before an optimizer exists), values in `on_train_start`, ranks
    during training in `on_train_batch_end` without touching a parameter's shape. A strategy never keeps the
    module it is given.

    A LightningModule that is no task of this package offers what `Compressible` says and keeps the strategy in the same
    way as its attribute `strategy`, or owns none: the strategy then stands among the trainer's callbacks.

    Args:
        targets: Which layers to factorise; all linears inside transformer blocks by default.
    """

    shrinks: ClassVar[bool] = False
    """Whether the model starts above its budget and comes down to it in training."""

    def __init__(self, targets: TargetSelector | None = None) -> None:
        self.targets = targets or TargetSelector()
        if self.targets.embeddings and (reason := self.why_no_embeddings()):
            raise EmbeddingsError(type(self).__name__, reason)
        self.adopted = False  # set by the task that owns it
        self.progress_folder: Path | None = None  # set by the verb `compress`
        self._mark: str | None = None
        self._fit_has_ended = False

    @classmethod
    def why_no_embeddings(cls) -> str:
        """Why the method cannot factorise the vocabulary's matrix; empty where it can."""
        return "it is for linear layers alone"

    @classmethod
    def why_not_sharded(cls) -> str:
        """Why the method cannot train a model whose parameters are divided among processes; empty where it can."""
        return "the method has not been tried on parameters of which each process has a part"

    @property
    def measure(self) -> Measure:
        """In what the method counts what a layer costs."""
        return Parameters()

    def told_beforehand(self, encoder: nn.Module, item: int, tokens: int | None) -> list[str]:
        """Lines for `inspect` about what a run will do and take at most, as far as shapes alone tell; none by default.

        Args:
            encoder: The model; its values do not matter.
            item: Bytes of one parameter.
            tokens: Of one calibration sample, as far as the data tell.
        """
        del encoder, item, tokens
        return []

    @property
    def keeps_progress(self) -> bool:
        """Whether `compress` keeps in `progress_folder` what is done, so that a run that was stopped goes on."""
        return False

    @property
    def at_budget(self) -> bool:
        """Whether the model has the size that was asked for; scores before that do not count as the method's."""
        return True

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the module's encoder the shapes it will train in. Called once, when no optimizer exists."""

    def has_prepared(self, pl_module: pl.LightningModule) -> bool:
        """Whether the module's encoder is the one that was prepared last: a further run must not do it again."""
        return self._mark is not None and as_compressible(pl_module).prepared_by == self._mark

    def mark_prepared(self, pl_module: pl.LightningModule) -> None:
        """Remembers the module's encoder as prepared, by a name that copies share, instead of a reference."""
        self._mark = as_compressible(pl_module).prepared_by = uuid4().hex

    @property
    def is_unfinished(self) -> bool:
        """Whether the model needs a training step before it is what was asked for."""
        return False

    def plan(self, encoder: nn.Module) -> Allocation | None:
        """What the strategy would do to the encoder, where that is known without data; changes nothing."""
        del encoder
        return None

    @property
    def plan_depends_on_data(self) -> bool:
        """Whether `plan` can only show other ranks of the same budget than the method will choose."""
        return False

    def check(self, encoder: nn.Module) -> None:
        """Raises an error for what `compress` could not do to an encoder, before any long work; changes nothing.

        Raises:
            NothingToCompressError: the method exists only as part of a training run, or does nothing.
        """
        del encoder
        raise NothingToCompressError(type(self).__name__)

    def check_compress(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises an error for what `compress` could not do in a run whose model and data are there; changes nothing.

        Called before the model is scored. What needs no data stands in `check`, which comes before they are prepared.

        Raises:
            NotCompressibleError: the module has no encoder.
        """
        del trainer
        self.check(as_compressible(pl_module, type(self).__name__, "encoder").encoder)

    def compress(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compresses the module's encoder at once, without training it.

        Raises:
            NothingToCompressError: the method exists only as part of a training run, or does nothing.
        """
        del trainer, pl_module
        raise NothingToCompressError(type(self).__name__)

    def check_run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises an error for a wrong place in the configuration and parallelism that is not tested.

        Raises:
            StrategyPlacementError: it stands under `trainer.callbacks`, and the module has a strategy of its own.
            UnsupportedParallelismError: the trainer uses neither a single device nor DDP, nor shards what this method
                and the module can train sharded.
            StartMethodError: DDP in forked or spawned processes.
        """
        if getattr(pl_module, "strategy", self) is not self:
            raise StrategyPlacementError(type(self).__name__)
        check_sharding = getattr(pl_module, "why_not_sharded", None)
        reason = _NOT_BY_ITSELF if check_sharding is None else check_sharding()
        check_parallelism(trainer.strategy, type(self).__name__, self.why_not_sharded() or reason)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Calls `check_run`, and prepares the encoder of a module that has not done so itself.

        Raises:
            NotCompressibleError: there is no encoder.
            UnsupportedCallbackError: a callback ahead of this one looks at the model before it is prepared.
        """
        self.check_run(trainer, pl_module)
        if stage != "fit" or self.has_prepared(pl_module):
            return
        if not hasattr(pl_module, "encoder"):
            build(trainer, pl_module)
        as_compressible(pl_module, type(self).__name__, "encoder")
        check_nothing_comes_before(self, trainer)
        self.prepare(trainer, pl_module)
        self.mark_prepared(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises an error for a run without any step, where the method needs one.

        Raises:
            NoTrainingStepError: nothing would ever be factorised.
        """
        del pl_module
        if self.is_unfinished and trainer.fit_loop.skip:
            raise NoTrainingStepError(type(self).__name__)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remembers that the run came to its end: `teardown` also follows a tuner that only tried something."""
        del trainer, pl_module
        self._fit_has_ended = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets a method look at what a run has left behind, when everything has been saved and reported."""
        if stage == "fit" and self._fit_has_ended:
            self._fit_has_ended = False
            self.conclude(trainer, pl_module)

    def conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes a run fail that has ended and left the model unfinished.

        Raises:
            NoTrainingStepError: there was no batch to train on.
        """
        del trainer, pl_module
        if self.is_unfinished:
            raise NoTrainingStepError(type(self).__name__)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises an error for an optimizer that lacks trainable parameters.

        Raises:
            OptimizerCoverageError: some parameters would silently never be trained.
        """
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in pl_module.named_parameters() if p.requires_grad and id(p) not in held]
        if missing:
            raise OptimizerCoverageError(missing)
