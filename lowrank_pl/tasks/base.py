"""The LightningModule around an encoder: building, training, scoring, saving."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from transformers import PreTrainedModel

from lowrank_pl.contract import HasTarget, TargetKind, TargetSpec
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import (
    MissingArgumentError,
    ResumeMismatchError,
    StrategyPlacementError,
    TargetKindError,
)
from lowrank_pl.hub import load_exactly, load_pretrained
from lowrank_pl.strategies import CompressionStrategy, NoCompression
from lowrank_pl.surgery import CompressionRecord, conform_, read_layout
from lowrank_pl.tasks import optimization, random_state
from lowrank_pl.tasks.compatibility import check_monitor_modes, check_same_architecture, check_same_target
from lowrank_pl.tasks.metrics import build_metrics, lower_is_better, score
from lowrank_pl.tasks.saved import SavedModel, check_state, describe, from_checkpoint, read_saved_model

logger = logging.getLogger(__name__)


class EncoderTask(pl.LightningModule, ABC):
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

    def __init__(
        self,
        pretrained: str | None = None,
        init_from: str | None = None,
        strategy: CompressionStrategy | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-5, weight_decay=0.01),
        scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise RangeError("warmup", warmup, "0 <= warmup < 1, the share of all steps")
        self.pretrained = pretrained
        self.init_from = init_from
        self.strategy = strategy or NoCompression()
        self.encoder: PreTrainedModel
        self.target: TargetSpec | None = None
        self.compression: CompressionRecord | None = None
        self.freshly_initialised_head = False
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self._warmup = warmup
        self._configured: list[dict[str, Any]] = []
        self._metrics: dict[str, MetricCollection] = {}
        self._losses: dict[str, MeanMetric] = {}
        self._random_states: list[dict[str, Tensor]] | None = None

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
        """The strategy: its hooks run as Lightning's."""
        # Lightning leaves a module's callbacks in the trainer; one that served another module has no part in this one.
        callbacks: list[pl.Callback] = getattr(self.trainer, "callbacks")  # noqa: B009, set without a type
        for callback in [c for c in callbacks if isinstance(c, CompressionStrategy)]:
            if not callback.adopted:
                raise StrategyPlacementError(type(callback).__name__)
            callbacks.remove(callback)
        self.strategy.adopted = True
        return [self.strategy]

    def configure_model(self) -> None:
        """Builds the encoder and, before training, lets the strategy give it its shapes."""
        if self.is_built or self._trainer is None:
            return  # without a trainer, load_from_checkpoint is at work and brings the architecture
        self.build(self._target_of_data())
        if self._is_fitting():
            self.strategy.prepare(self.encoder)

    def setup(self, stage: str) -> None:
        """Refuses a checkpoint callback that would keep the worst model: some scores are better when lower."""
        if stage == "fit":
            check_monitor_modes(self.trainer, self._target_of_data())

    def build(self, target: TargetSpec | None = None) -> None:
        """Builds the encoder from `init_from` or `pretrained`, for a target (default: one output per label).

        Raises:
            MissingArgumentError: neither is given.
            CheckpointMismatchError: `init_from` was trained to predict something else.
        """
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

    def _target_of_data(self) -> TargetSpec | None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, HasTarget):
            return None
        target = datamodule.target
        if target.kind not in self.kinds:
            raise TargetKindError(type(self).__name__, self.kinds, target.name, target.kind)
        return target

    def _head_config(self, target: TargetSpec | None) -> dict[str, Any]:
        """Fields of the encoder's configuration that depend on the labels."""
        if target is None or target.kind == "masked_lm":
            return {}
        if target.kind == "regression":
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(target.label_names))
        return {"id2label": names, "label2id": {name: index for index, name in names.items()}}

    # Steps.

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
        self.log(f"{stage}/loss", self._losses[stage].compute(), prog_bar=True)
        values = self._metrics[stage].compute()
        for name, value in values.items():
            self.log(f"{stage}/{name}", value)
        found = score(self.target, values)
        self.log(f"{stage}/score", found, prog_bar=True)
        if stage == "val":
            # Under a shrinking budget the best score is always an early, large model's: one to select by.
            worst = math.inf if lower_is_better(self.target) else -math.inf
            self.log("val/score_at_budget", found if self.strategy.at_budget else worst)

    # Optimizers.

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all trainable parameters and a scheduler stepped with it."""
        optimizer = self._make_optimizer(optimization.decay_groups(self))
        if self._make_scheduler is not None:
            scheduler: Any = self._make_scheduler(optimizer)
        else:
            steps = self.trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise MissingArgumentError(
                    "the length of the run", "Set trainer.max_epochs or trainer.max_steps: the schedule needs its end."
                )
            scheduler = optimization.linear_warmup_decay(optimizer, int(steps), self._warmup)
        self._configured = optimization.settings(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Restores a resumed run's random states and tells which settings its optimizer state has replaced."""
        if self._random_states is not None:
            random_state.restore(self._random_states, self.trainer.global_rank)
            self._random_states = None
        if self.trainer.ckpt_path is not None:
            for optimizer in self.trainer.optimizers:
                for message in optimization.overridden(self._configured, optimizer):
                    logger.warning("resuming: %s; for new settings start a new run with init_from", message)

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what loading needs to know: architecture, ranks, labels."""
        assert self.target is not None
        checkpoint.update(describe(self.encoder.config, read_layout(self.encoder), self.target, self.compression))
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
            checkpoint["state_dict"] = saved.replace_in(checkpoint["state_dict"])
        self._random_states = checkpoint.get(random_state.RANDOM_KEY) if self._is_fitting() else None
        if not self.is_built:
            self._restore(saved, None)
            return
        if saved.target is not None:
            if self.target is not None:
                check_same_target(saved, self.target)
            self.target = saved.target
        layout = read_layout(self.encoder)
        if layout.modules and (difference := layout.difference(saved.layout)) and self._is_fitting():
            raise ResumeMismatchError(difference)
        conform_(self.encoder, saved.layout, saved.source)
        check_state(self.encoder.state_dict(), saved.state, saved.source)
        self.compression = saved.compression
        self.freshly_initialised_head = False

    def _is_fitting(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
