"""A model in a checkpoint: what is written beside its weights, and how a module gets the checkpoint's shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.checkpoint import (
    SavedModel,
    build,
    check_state,
    describe,
    from_checkpoint,
    name_in_transformers,
    saved_layout,
)
from lowrank_pl.contract import TargetSpec
from lowrank_pl.errors.parallelism import UnsupportedParallelismError
from lowrank_pl.errors.run import ResumeMismatchError
from lowrank_pl.hub import lasting_name
from lowrank_pl.strategies import CompressionStrategy
from lowrank_pl.strategies.processes import shards
from lowrank_pl.surgery import CompressionRecord, ModelLayout, conform_, read_layout
from lowrank_pl.tasks import random_state
from lowrank_pl.tasks.compatibility import check_same_architecture, check_same_target
from lowrank_pl.tasks.scored import ScoredModule
from lowrank_pl.tasks.sharding import RESUMED


class CheckpointedModule(ScoredModule, ABC):
    """A module around an encoder that its checkpoint rebuilds, without the strategy and the pre-trained weights.

    Args:
        pretrained: Where the tokenizer comes from, and the encoder unless it is restored.
        strategy: How to compress.
        optimizer: See `ScheduledModule`, likewise for the others.
        scheduler: See there.
        warmup: See there.

    Attributes:
        encoder: The model with its head; missing until it is built.
        compression: How it was compressed, once it was.
        freshly_initialised_head: Whether its head is random.
        prepared_by: The mark of the strategy that has given it its shapes.
    """

    auto_class: ClassVar[Any]

    def __init__(
        self,
        pretrained: str | None,
        strategy: CompressionStrategy,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        warmup: float,
    ) -> None:
        super().__init__(optimizer, scheduler, warmup)
        self.pretrained = pretrained
        self.strategy = strategy
        self.encoder: PreTrainedModel
        self.compression: CompressionRecord | None = None
        self.freshly_initialised_head = False
        self.prepared_by: str | None = None
        self._prepared_layout: ModelLayout | None = None
        self._random_states: list[dict[str, Tensor]] | None = None
        self._checkpoint_to_load: str | None = None
        self._restored_tokenizer: str | None = None

    @property
    def is_built(self) -> bool:
        """Whether the encoder exists yet."""
        return "encoder" in self._modules

    @property
    def at_budget(self) -> bool:
        """Whether the model has the size that was asked for: by the strategy in training, else by its record."""
        if self.is_fitting or self.compression is None:
            return self.strategy.at_budget
        return self.compression.at_budget

    @abstractmethod
    def _target_of_data(self) -> TargetSpec | None:
        """What the data of the run ask for, as far as they know."""

    # The checkpoint of the coming run.

    def expect_checkpoint(self, path: str | None) -> None:
        """Is told by the trainer which checkpoint the coming run loads before it starts, `None` for none."""
        self._checkpoint_to_load = path

    @property
    def layout_to_resume(self) -> ModelLayout | None:
        """The layout of the checkpoint that the coming `fit` resumes; `None` for a new run, or where nobody told."""
        if self._checkpoint_to_load is None or not self.is_fitting:
            return None
        return saved_layout(self._checkpoint_to_load)

    # Restoring.

    def _restore(self, saved: SavedModel, target: TargetSpec | None) -> None:
        """Takes over a model from disk, with its head, for a target (default: the one that it was trained for).

        Raises:
            CheckpointMismatchError: it predicts something else, or weights and layout disagree.
        """
        target = target or saved.target
        if target is not None:
            check_same_target(saved, target)
        self.encoder = build(saved, self.auto_class).train()  # Lightning trains a module in the mode it finds it in
        self.target = target
        self.compression = saved.compression
        self.freshly_initialised_head = False
        self._restored_tokenizer = saved.tokenizer

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Brings the module tree into the checkpoint's shapes before its weights are loaded.

        Raises:
            NotACheckpointError, LayoutVersionError, CheckpointMismatchError: it is not a fitting checkpoint.
            ResumeMismatchError: it would resume a run whose factorised layers differ.
            UnsupportedParallelismError: parameters are divided among processes; Lightning's own trainer comes as far.
        """
        if self.is_fitting and shards(self.trainer.strategy):
            name = type(self.trainer.strategy).__name__
            raise UnsupportedParallelismError(type(self.strategy).__name__, name, RESUMED)
        saved = from_checkpoint(checkpoint, "the checkpoint")
        if not self.is_fitting:
            # Only a run that goes on needs the training form; Lightning loads what is left in the checkpoint.
            saved = saved.compacted()
        # Also what an earlier version has written gets its names of today.
        checkpoint["state_dict"] = saved.replace_in(checkpoint["state_dict"])
        self._random_states = checkpoint.get(random_state.RANDOM_KEY) if self.is_fitting else None
        if not self.is_built:
            if self._trainer is not None and self.pretrained is not None:
                check_same_architecture(saved, self.pretrained)
            self._restore(saved, self._target_of_data() if self._trainer is not None else None)
            return
        if saved.target is not None:
            if self.target is not None:
                check_same_target(saved, self.target)
            self.target = saved.target
        self._conform(saved)
        check_state(self.encoder.state_dict(), saved.state, saved.source)
        self.compression = saved.compression
        self.freshly_initialised_head = False

    def _conform(self, saved: SavedModel) -> None:
        """Gives the encoder that was built before the shapes of a checkpoint."""
        layout = read_layout(self.encoder)
        if self.is_fitting:
            # A run that has ended in this process left its layers in another form than that in which they train.
            trained = self._prepared_layout or layout
            if trained.modules and (difference := trained.difference(saved.layout)):
                raise ResumeMismatchError(difference)
            self._prepared_layout = saved.layout
        elif layout != saved.layout:
            self.prepared_by = None  # this is not the encoder any more that the strategy has prepared
        conform_(self.encoder, saved.layout, saved.source)

    def on_train_start(self) -> None:
        """Restores a resumed run's random states; see `ScheduledModule`."""
        super().on_train_start()
        if self._random_states is not None:
            random_state.restore(self._random_states, self.trainer.global_rank)
            self._random_states = None

    # Saving.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what loading needs to know: architecture, ranks, labels."""
        assert self.target is not None
        record = self.compression
        if record is not None and self.is_fitting:
            record = replace(record, at_budget=record.at_budget and self.strategy.at_budget)
        layout, made_by = read_layout(self.encoder), name_in_transformers(self.auto_class)
        generation = self.encoder.generation_config.to_diff_dict() if self.encoder.can_generate() else None
        tokenizer = self._tokenizer()
        checkpoint.update(describe(self.encoder.config, layout, self.target, record, tokenizer, made_by, generation))
        if self.is_fitting:
            checkpoint[random_state.RANDOM_KEY] = random_state.capture()

    def _tokenizer(self) -> str | None:
        """Where the tokenizer is that the model is trained with, for whoever loads its checkpoint."""
        return self._restored_tokenizer if self.pretrained is None else lasting_name(self.pretrained)
