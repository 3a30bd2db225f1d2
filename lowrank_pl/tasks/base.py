"""The LightningModule around an encoder: building, training, scoring, saving."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from transformers import PreTrainedModel

from lowrank_pl.contract import AdoptsTarget, HasTarget, TargetKind, TargetSpec
from lowrank_pl.errors.run import (
    MissingArgumentError,
    ResumeMismatchError,
    StrategyPlacementError,
)
from lowrank_pl.hub import lasting_name, load_exactly, load_pretrained
from lowrank_pl.strategies import CompressionStrategy, NoCompression
from lowrank_pl.strategies.averaging import averaged_models, copy_buffers_instead_of_averaging_
from lowrank_pl.strategies.processes import check_parallelism
from lowrank_pl.surgery import CompressionRecord, ModelLayout, conform_, read_layout
from lowrank_pl.tasks import budget_score, optimization, random_state
from lowrank_pl.tasks.before_data import check_before_data, check_kind, tell_target
from lowrank_pl.tasks.callbacks import check_callbacks
from lowrank_pl.tasks.compatibility import check_same_architecture, check_same_target
from lowrank_pl.tasks.encoder_first import EncoderFirst
from lowrank_pl.tasks.metrics import build_metrics, score
from lowrank_pl.tasks.saved import SavedModel, check_state, describe, from_checkpoint, read_saved_model, saved_layout
from lowrank_pl.tasks.scheduled import ScheduledModule

logger = logging.getLogger(__name__)


class EncoderTask(ScheduledModule, ABC):
    """Fine-tunes any Hugging Face encoder, factorised or not.

    The encoder is built in `configure_model`, when the data have told what to predict. A checkpoint holds the
    architecture, the factorised layers' ranks and the labels beside the weights, so `load_from_checkpoint(path)`
    and `--ckpt_path` need neither the strategy nor the pre-trained weights.

    Args:
        pretrained: The encoder to start from: a hub id, a folder, or `pkg://module/sub/folder` for a model carried
            by an installed Python package. Its tokenizer is used for the data.
        init_from: Start from these weights instead, head included: a Lightning checkpoint of this package, the
            output folder of `compress`, or a Hugging Face folder; dense or factorised. A new run, unlike
            `--ckpt_path`, which resumes one.
        strategy: How to compress; plain fine-tuning by default.
        optimizer: Makes the optimizer from parameter groups (biases and norms get no weight decay).
        scheduler: Makes the learning-rate scheduler, stepped after every optimizer step. By default linear warm-up
            and linear decay to zero.
        warmup: Share of all steps that the default scheduler warms up for, `0 <= warmup < 1`.
    """

    auto_class: ClassVar[Any]
    kinds: ClassVar[tuple[TargetKind, ...]]
    apart_from_losses: ClassVar[tuple[str, ...]] = (
        "pretrained",
        "init_from",
        "strategy",
        "target",
        "compression",
        "freshly_initialised_head",
        "_make_optimizer",
        "_make_scheduler",
        "_warmup",
        "_configured",
        "_metrics",
        "_losses",
        "_random_states",
        "prepared_by",
        "_prepared_layout",
        "_checkpoint_to_load",
        "_restored_tokenizer",
        "_scheduled_steps",
        "_found_lr",
    )
    """Attributes that losses do not depend on: a measurement made with others is found again in the Fisher cache."""

    def __init__(
        self,
        pretrained: str | None = None,
        init_from: str | None = None,
        strategy: CompressionStrategy | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-5, weight_decay=0.01),
        scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.1,
    ) -> None:
        # A lambda, the form of a default that the command line can show and override, cannot be pickled.
        picklable = optimization.default_optimizer if optimizer is _DEFAULT_OPTIMIZER else optimizer
        super().__init__(picklable, scheduler, warmup)
        self.pretrained = pretrained
        self.init_from = init_from
        self.strategy = strategy or NoCompression()
        self.encoder: PreTrainedModel
        self.target: TargetSpec | None = None
        self.compression: CompressionRecord | None = None
        self.freshly_initialised_head = False
        self.prepared_by: str | None = None
        self._prepared_layout: ModelLayout | None = None
        self._metrics: dict[str, MetricCollection] = {}
        self._losses: dict[str, MeanMetric] = {}
        self._random_states: list[dict[str, Tensor]] | None = None
        self._checkpoint_to_load: str | None = None
        self._restored_tokenizer: str | None = None

    # What a task adds to the encoder.

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses `[b]` of a batch's samples, each as if it were alone."""

    @abstractmethod
    def predictions(self, logits: Tensor) -> Tensor:
        """What the model predicts: class ids or values, first dimension samples."""

    def training_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The scalar that training minimises: the mean of `losses`."""
        return self.losses(logits, labels).mean()

    def metric_inputs(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the metrics compare."""
        return logits, labels

    # Building.

    @property
    def is_built(self) -> bool:
        """Whether the encoder exists yet."""
        return "encoder" in self._modules

    def configure_callbacks(self) -> Sequence[pl.Callback]:
        """The strategy: its hooks run as Lightning's. Refuses, before data are prepared, what needs none to be seen."""
        tell_target(self, getattr(self.trainer, "datamodule", None), self._checkpoint_to_load)
        check_before_data(self, self.trainer)
        # Lightning leaves a module's callbacks in the trainer; one that served another module has no part in this one.
        callbacks: list[pl.Callback] = getattr(self.trainer, "callbacks")  # noqa: B009, set without a type
        for callback in [c for c in callbacks if isinstance(c, (CompressionStrategy, EncoderFirst))]:
            if isinstance(callback, CompressionStrategy) and not callback.adopted:
                raise StrategyPlacementError(type(callback).__name__)
            callbacks.remove(callback)
        # `setup` comes after the data's preparation.
        check_parallelism(self.trainer.strategy, type(self.strategy).__name__)
        callbacks.insert(0, EncoderFirst())
        self.strategy.adopted = True
        return [self.strategy]

    def expect_checkpoint(self, path: str | None) -> None:
        """Is told by the trainer which checkpoint the coming run loads before it starts, `None` for none."""
        self._checkpoint_to_load = path

    @property
    def layout_to_resume(self) -> ModelLayout | None:
        """The layout of the checkpoint that the coming `fit` resumes; `None` for a new run, or where nobody told."""
        if self._checkpoint_to_load is None or not self._is_fitting():
            return None
        return saved_layout(self._checkpoint_to_load)

    def check_run(self, stage: str) -> None:
        """Refuses data, parallelism and callbacks that do not fit, before any long work."""
        self.strategy.check_run(self.trainer, self)
        target = self._target_of_data()
        if stage == "fit":
            check_callbacks(self.trainer, self.strategy, target)

    def configure_model(self) -> None:
        """Builds the encoder and, before training, lets the strategy give it its shapes, once."""
        if self._trainer is None:
            return  # load_from_checkpoint is at work and brings the architecture
        target = self._target_of_data()
        if not self.is_built:
            if self._checkpoint_to_load is not None and not self._is_fitting():
                return  # so does the checkpoint that is to be scored or to predict
            self.build(target)
        elif target is not None:
            self._take_target(target)
        if self._is_fitting() and not self.strategy.has_prepared(self):
            self.strategy.prepare(self.trainer, self)
            self.strategy.mark_prepared(self)
            self._prepared_layout = read_layout(self.encoder)

    def setup(self, stage: str) -> None:
        """Lets averaging callbacks know what can be averaged; their copies compress nothing by themselves."""
        if stage == "fit":
            copy_buffers_instead_of_averaging_(self.trainer)
            for model in averaged_models(self.trainer):
                setattr(model, "strategy", NoCompression())  # noqa: B010, of a copy of this module

    def build(self, target: TargetSpec | None = None) -> None:
        """Builds the encoder from `init_from` or `pretrained`, for a target (default: one output per label).

        Raises:
            MissingArgumentError: neither is given.
            CheckpointMismatchError: `init_from` was trained to predict something else.
        """
        self.prepared_by, self._prepared_layout = None, None
        if self.init_from is not None:
            saved = read_saved_model(self.init_from)
            if self.pretrained is not None:
                check_same_architecture(saved, self.pretrained)
            self._restore(saved, target)
        elif self.pretrained is not None:
            head = self._head_config(target)
            self.encoder, self.freshly_initialised_head = load_pretrained(self.auto_class, self.pretrained, **head)
            self.target = target
        else:
            raise MissingArgumentError(
                "a model to start from", "Set model.init_args.pretrained (hub id, folder, pkg://…) or .init_from."
            )

    def _restore(self, saved: SavedModel, target: TargetSpec | None) -> None:
        target = target or saved.target
        if target is not None:
            check_same_target(saved, target)
        if saved.dense_folder is not None:
            self.encoder = load_exactly(self.auto_class, saved.dense_folder, saved.config)
        else:
            # Not the configuration's dtype: the trainer's precision decides.
            encoder = self.auto_class.from_config(saved.config, dtype=torch.get_default_dtype())
            saved.load_into_(encoder)
            self.encoder = encoder.train()
        self.target = target
        self.compression = saved.compression
        self.freshly_initialised_head = False
        self._restored_tokenizer = saved.tokenizer

    def _tokenizer(self) -> str | None:
        """Where the tokenizer is that the model is trained with, for whoever loads its checkpoint."""
        return self._restored_tokenizer if self.pretrained is None else lasting_name(self.pretrained)

    def _take_target(self, target: TargetSpec) -> None:
        """Takes the data's target for an encoder that was built before, if its head fits."""
        built = SavedModel("the encoder that the task holds", self.encoder.config, ModelLayout({}), {}, self.target)
        check_same_target(built, target)
        if self.target is None:
            for name, value in self._head_config(target).items():
                setattr(self.encoder.config, name, value)
        self.target = target

    def _target_of_data(self) -> TargetSpec | None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, AdoptsTarget) and not datamodule.knows_target:
            return None
        if not isinstance(datamodule, HasTarget):
            return None
        check_kind(self, datamodule.target)
        return datamodule.target

    def _head_config(self, target: TargetSpec | None) -> dict[str, Any]:
        """Fields of the encoder's configuration that depend on the labels."""
        if target is None or target.kind == "masked_lm":
            return {}
        if target.kind == "regression":
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(target.label_names))
        return {"id2label": names, "label2id": {name: index for index, name in names.items()}}

    # Steps.

    # It looks at signatures, which `torch.compile(task)` cannot follow.
    log = torch.compiler.disable(pl.LightningModule.log)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of a batch; `labels` in it are ignored."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: Tensor = self.encoder(**inputs).logits
        return logits

    def per_sample_losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Losses `[b]` of a batch's samples, each as if it were alone; float32."""
        return self.losses(self(batch).float(), batch["labels"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One forward pass and its loss."""
        del batch_idx
        loss = self.training_loss(self(batch).float(), batch["labels"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to `val/loss` and the metrics."""
        del batch_idx
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to `test/loss` and the metrics."""
        del batch_idx
        self._evaluate("test", batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Predictions of a batch; its labels, if it has any; logits, unless there is a prediction per token."""
        del batch_idx
        logits = self(batch).float()
        result = {"prediction": self.predictions(logits)}
        if result["prediction"].ndim == 1:
            # One row per token and class, kept for all batches, would fill the memory.
            result["logits"] = logits
        return result | {name: batch[name] for name in ("labels",) if name in batch}

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        logits, labels = self(batch).float(), batch["labels"]
        loss = self.training_loss(logits, labels)
        self._losses[stage].update(loss, len(labels))
        self._metrics[stage].update(*self.metric_inputs(logits, labels))

    def _start_metrics(self, stage: str) -> None:
        if self.target is None:
            raise MissingArgumentError(
                "what the labels mean", "Pass a datamodule that has a `target`, such as every class of lowrank_pl.data."
            )
        self._metrics[stage] = build_metrics(self.target).to(self.device)
        # Not self.log with sync_dist: it averages the counts of unequal shards as integers.
        self._losses[stage] = MeanMetric().to(self.device)

    def on_test_start(self) -> None:
        """Tells when a strategy is configured and the model that is scored is dense all the same."""
        if not isinstance(self.strategy, NoCompression) and not read_layout(self.encoder).modules:
            name = type(self.strategy).__name__
            logger.warning("test scores a dense model although the strategy is %s: give a compressed checkpoint", name)

    def on_validation_epoch_start(self) -> None:
        """Starts fresh metrics."""
        self._start_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Starts fresh metrics."""
        self._start_metrics("test")

    def on_validation_epoch_end(self) -> None:
        """Logs `val/score` and every metric."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs `test/score` and every metric."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        assert self.target is not None
        self._log_computed(f"{stage}/loss", self._losses[stage].compute(), prog_bar=True)
        values = self._metrics[stage].compute()
        for name, value in values.items():
            self._log_computed(f"{stage}/{name}", value)
        found = score(self.target, values)
        self._log_computed(f"{stage}/score", found, prog_bar=True)
        if stage == "val":
            self._log_score_at_budget(found)

    def _log_computed(self, name: str, value: Tensor | float, prog_bar: bool = False, logger: bool = True) -> None:
        """Logs what torchmetrics has reduced over processes already: the same number on each of them."""
        # Lightning warns of values that it does not reduce. The maximum of equal numbers is that number exactly.
        self.log(name, value, prog_bar=prog_bar, logger=logger, sync_dist=True, reduce_fx="max")

    @property
    def at_budget(self) -> bool:
        """Whether the model has the size that was asked for: by the strategy in training, else by its record."""
        if self._is_fitting() or self.compression is None:
            return self.strategy.at_budget
        return self.compression.at_budget

    def _log_score_at_budget(self, found: Tensor) -> None:
        """Under a shrinking budget the best score is always an early, large model's: this is one to select by."""
        assert self.target is not None
        if not self._is_fitting():
            none = torch.full_like(found, budget_score.no_score(self.target))
            self._log_computed(budget_score.KEY, found if self.at_budget else none)
            return
        if self.at_budget and not self.trainer.sanity_checking:
            for writer in self.loggers:
                writer.log_metrics({budget_score.KEY: float(found)}, self.trainer.global_step)
        left = self.trainer.estimated_stepping_batches - self.trainer.global_step
        before = torch.full_like(found, budget_score.stand_in(self.target, left))
        # What stands for a score before there is one is for callbacks: in a logger's chart it would hide the scores.
        self._log_computed(budget_score.KEY, found if self.at_budget else before, logger=False)

    def on_train_start(self) -> None:
        """Restores a resumed run's random states; see `ScheduledModule`."""
        super().on_train_start()
        if self._random_states is not None:
            random_state.restore(self._random_states, self.trainer.global_rank)
            self._random_states = None

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what loading needs to know: architecture, ranks, labels."""
        assert self.target is not None
        record = self.compression
        if record is not None and self._is_fitting():
            record = replace(record, at_budget=record.at_budget and self.strategy.at_budget)
        layout = read_layout(self.encoder)
        checkpoint.update(describe(self.encoder.config, layout, self.target, record, self._tokenizer()))
        if self._is_fitting():
            checkpoint[random_state.RANDOM_KEY] = random_state.capture()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Brings the module tree into the checkpoint's shapes before its weights are loaded.

        Raises:
            NotACheckpointError, LayoutVersionError, CheckpointMismatchError: it is not a fitting checkpoint.
            ResumeMismatchError: it would resume a run whose factorised layers differ.
        """
        saved = from_checkpoint(checkpoint, "the checkpoint")
        if not self._is_fitting():
            # Only a run that goes on needs the training form; Lightning loads what is left in the checkpoint.
            saved = saved.compacted()
        # Also what an earlier version has written gets its names of today.
        checkpoint["state_dict"] = saved.replace_in(checkpoint["state_dict"])
        self._random_states = checkpoint.get(random_state.RANDOM_KEY) if self._is_fitting() else None
        if not self.is_built:
            if self._trainer is not None and self.pretrained is not None:
                check_same_architecture(saved, self.pretrained)
            self._restore(saved, self._target_of_data() if self._trainer is not None else None)
            return
        if saved.target is not None:
            if self.target is not None:
                check_same_target(saved, self.target)
            self.target = saved.target
        layout = read_layout(self.encoder)
        if self._is_fitting():
            # A run that has ended in this process left its layers in another form than that in which they train.
            trained = self._prepared_layout or layout
            if trained.modules and (difference := trained.difference(saved.layout)):
                raise ResumeMismatchError(difference)
            self._prepared_layout = saved.layout
        elif layout != saved.layout:
            self.prepared_by = None  # this is not the encoder any more that the strategy has prepared
        conform_(self.encoder, saved.layout, saved.source)
        check_state(self.encoder.state_dict(), saved.state, saved.source)
        self.compression = saved.compression
        self.freshly_initialised_head = False

    def _is_fitting(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING


_DEFAULT_OPTIMIZER = inspect.signature(EncoderTask).parameters["optimizer"].default
