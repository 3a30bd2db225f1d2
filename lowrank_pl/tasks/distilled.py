"""Training with a teacher beside the labels. b: samples, t: tokens, c: classes."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lowrank_pl.contract import LANGUAGE_MODELLING
from lowrank_pl.core.distillation import hidden_states_error, softened_divergence
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.strategies import Calibration, CompressionStrategy
from lowrank_pl.strategies.calibration import calibration_batches
from lowrank_pl.surgery import read_layout
from lowrank_pl.tasks.checkpointed import CheckpointedModule
from lowrank_pl.tasks.distillation import SELF, Distillation
from lowrank_pl.tasks.taught_logits import TaughtLogits
from lowrank_pl.tasks.teacher import Teacher, after_blocks, wanting
from lowrank_pl.tasks.teaching import RESUME_KEY, check_can_teach_itself, check_same_lesson, load_teacher


class DistilledModule(CheckpointedModule, ABC):
    """A module that trains on its task's loss and, where it has a teacher, on what that one makes of the batch.

    Args:
        distillation: Which teacher, and what of it counts; `None` for none.
        pretrained: See `CheckpointedModule`, likewise for the others.
        strategy: See there.
        optimizer: See there.
        scheduler: See there.
        warmup: See there.
    """

    def __init__(
        self,
        distillation: Distillation | None,
        pretrained: str | None,
        strategy: CompressionStrategy,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        warmup: float,
    ) -> None:
        super().__init__(pretrained, strategy, optimizer, scheduler, warmup)
        self.distillation = distillation
        self._teacher: Teacher | None = None
        self._taught: TaughtLogits | None = None

    def imitation_loss(self, logits: Tensor, taught: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """How far logits are from a teacher's, a scalar: the mean softened divergence over samples.

        Args:
            logits: Of the model, as `training_loss` takes them.
            taught: Of the teacher.
            labels: Of the batch; they tell where a prediction counts.
            temperature: Of the divergence between classes.
        """
        del labels
        return softened_divergence(logits, taught, temperature).mean()

    def take_teacher(self) -> None:
        """Makes the teacher of the coming training, before the strategy changes the encoder.

        Raises:
            TeacherError: it cannot teach this model; see `lowrank_pl.tasks.teaching`.
        """
        asked = self.distillation
        if asked is None or not asked.needs_teacher:
            self._teacher = self._taught = None
            return
        if asked.cache:
            self._check_cache()
        if self._teacher is not None and (asked.teacher != SELF or self.strategy.has_prepared(self)):
            return  # of an earlier training of the same encoder
        self._taught = None
        if asked.teacher != SELF:
            reads = self.encoder.config, self._tokenizer(), self.target, self._max_length()
            self._teacher = load_teacher(asked, self.auto_class, *reads)
        else:
            source = getattr(self, "init_from", None) or self.pretrained or type(self.encoder).__name__
            check_can_teach_itself(source, read_layout(self.encoder), self.freshly_initialised_head)
            self._teacher = Teacher(copy.deepcopy(self.encoder))

    def _max_length(self) -> int | None:
        """Tokens of the longest samples, where the data tell."""
        datamodule = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        length = getattr(datamodule, "max_length", None)
        return length if isinstance(length, int) else None

    @abstractmethod
    def model_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """What of a batch the encoder takes."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One forward pass and its loss."""
        del batch_idx
        loss = self._plain_loss(batch) if self.distillation is None else self._distilled_loss(batch, self.distillation)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _plain_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.training_loss(self(batch).float(), batch["labels"])

    def _distilled_loss(self, batch: dict[str, Tensor], asked: Distillation) -> Tensor:
        """The weighted sum, with its parts in the log."""
        deep = asked.hidden_states > 0
        found: Any = self.encoder(**self.model_inputs(batch), **wanting(deep))
        logits, labels = found.logits.float(), batch["labels"]
        task_loss = self.training_loss(logits, labels)
        self.log("train/task_loss", task_loss)
        loss = asked.labels * task_loss
        if self._teacher is None:
            return loss
        taught, states = self._ask(self._teacher, batch, deep)
        if asked.logits > 0:
            term = self.imitation_loss(logits, taught, labels, asked.temperature)
            self.log("train/distillation", term)
            loss = loss + asked.logits * term
        if deep:
            term = hidden_states_error(after_blocks(found), states, batch.get("attention_mask"))
            self.log("train/hidden_states", term)
            loss = loss + asked.hidden_states * term
        return loss

    def _asked(self, teacher: Teacher, batch: dict[str, Tensor], deep: bool) -> tuple[Tensor, Sequence[Tensor]]:
        """What the teacher makes of a batch, from memory where it was asked before."""
        known = self._taught.find(batch) if self._taught is not None else None
        return teacher(batch, deep) if known is None else (known, ())

    # A compiler would look into a model that is no part of the one that it compiles.
    _ask = torch.compiler.disable(_asked)

    def on_train_start(self) -> None:
        """Asks the teacher once for all, where that is wanted; see `CheckpointedModule`."""
        super().on_train_start()
        asked = self.distillation
        if asked is not None and asked.cache and self._teacher is not None and self._taught is None:
            taught = TaughtLogits()
            taught.ask(self.trainer, self._teacher)
            self._taught = taught

    def on_fit_end(self) -> None:
        """Frees the device of the teacher, as Lightning does of the model."""
        super().on_fit_end()
        if self._teacher is not None:
            self._teacher.to(torch.device("cpu"))

    def _check_cache(self) -> None:
        """Raises an error where samples are not the same in every epoch, or not handed out in order.

        Raises:
            RangeError, CalibrationError: telling what to do.
        """
        if self.target is not None and self.target.kind in LANGUAGE_MODELLING:
            allowed = (
                "false for language modelling: masks change with the epoch, and logits of all tokens fill the memory"
            )
            raise RangeError("distillation.cache", True, allowed)
        calibration_batches(self.trainer, Calibration(), "distillation.cache")

    # Checkpoints: the teacher is in none, but a run goes on with the one that it had.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what was learned from, to know it again."""
        super().on_save_checkpoint(checkpoint)
        if self.is_fitting:
            checkpoint[RESUME_KEY] = self._learned_from()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises an error for resuming a run that learned from something else; see `CheckpointedModule`.

        Raises:
            ResumeMismatchError: see `check_same_lesson`.
        """
        if self.is_fitting:
            check_same_lesson(checkpoint.get(RESUME_KEY) or {}, self._learned_from())
        super().on_load_checkpoint(checkpoint)

    def _learned_from(self) -> dict[str, Any]:
        """The options, with a digest of the teacher in the place of its path; empty without one."""
        if self.distillation is None or self._teacher is None:
            return {}
        return {**self.distillation.options(), "teacher": self._teacher.digest}
