"""The LightningModule around an encoder: building it, and the steps of a run; scores and checkpoints are its bases'."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lowrank_pl.checkpoint import SavedModel, read_saved_model
from lowrank_pl.contract import LANGUAGE_MODELLING, AdoptsTarget, HasTarget, TargetKind, TargetSpec
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.run import StrategyPlacementError
from lowrank_pl.hub import load_pretrained
from lowrank_pl.strategies import CompressionStrategy, NoCompression
from lowrank_pl.strategies.averaging import averaged_models, copy_buffers_instead_of_averaging_
from lowrank_pl.strategies.processes import check_parallelism, shards
from lowrank_pl.surgery import ModelLayout, read_layout
from lowrank_pl.tasks import finite_scores, optimization
from lowrank_pl.tasks.before_data import check_before_data, check_kind, tell_target
from lowrank_pl.tasks.callbacks import check_callbacks
from lowrank_pl.tasks.compatibility import check_same_architecture, check_same_target
from lowrank_pl.tasks.distillation import Distillation
from lowrank_pl.tasks.distilled import DistilledModule
from lowrank_pl.tasks.encoder_first import EncoderFirst
from lowrank_pl.tasks.kept_precision import computed_as_before
from lowrank_pl.tasks.sharding import RESUMED, EvenValidation, shard_

logger = logging.getLogger(__name__)


class EncoderTask(DistilledModule, ABC):
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
        scheduler: Makes the learning-rate scheduler, stepped after every optimizer step, or after every epoch for
            `lightning.pytorch.cli.ReduceLROnPlateau`. By default linear warm-up and linear decay to zero.
        warmup: Share of all steps that the default scheduler warms up for, `0 <= warmup < 1`.
        distillation: A teacher to learn from beside the labels, see `Distillation`; none by default.
    """

    kinds: ClassVar[tuple[TargetKind, ...]]
    apart_from_losses: ClassVar[tuple[str, ...]] = (
        "pretrained",
        "init_from",
        "strategy",
        "distillation",
        "target",
        "compression",
        "freshly_initialised_head",
        "_make_optimizer",
        "_make_scheduler",
        "_warmup",
        "_configured",
        "_metrics",
        "_losses",
        "_not_finite",
        "_random_states",
        "prepared_by",
        "_prepared_layout",
        "_checkpoint_to_load",
        "_restored_tokenizer",
        "_scheduled_steps",
        "_found_lr",
        "_teacher",
        "_taught",
    )
    """Attributes that losses do not depend on: a measurement made with others is found again in the Fisher cache."""

    def __init__(
        self,
        pretrained: str | None = None,
        init_from: str | None = None,
        strategy: CompressionStrategy | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-5, weight_decay=0.01, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.1,
        distillation: Distillation | None = None,
    ) -> None:
        # A lambda, the form of a default that the command line can show and override, cannot be pickled.
        picklable = optimization.default_optimizer if optimizer is _DEFAULT_OPTIMIZER else optimizer
        super().__init__(distillation, pretrained, strategy or NoCompression(), picklable, scheduler, warmup)
        self.init_from = init_from

    # What a task adds to the encoder.

    @abstractmethod
    def predictions(self, logits: Tensor) -> Tensor:
        """What the model predicts: class ids or values, first dimension samples."""

    # Building.

    def configure_callbacks(self) -> Sequence[pl.Callback]:
        """The strategy: its hooks run as Lightning's. What needs no data to be seen raises here."""
        tell_target(self, getattr(self.trainer, "datamodule", None), self._checkpoint_to_load)
        check_before_data(self, self.trainer, self._checkpoint_to_load)
        # Lightning leaves a module's callbacks in the trainer; one that served another module has no part in this one.
        callbacks: list[pl.Callback] = getattr(self.trainer, "callbacks")  # noqa: B009, set without a type
        for callback in [c for c in callbacks if isinstance(c, (CompressionStrategy, EncoderFirst, EvenValidation))]:
            if isinstance(callback, CompressionStrategy) and not callback.adopted:
                raise StrategyPlacementError(type(callback).__name__)
            callbacks.remove(callback)
        # `setup` comes after the data's preparation.
        reason = self.strategy.why_not_sharded() or self.why_not_sharded()
        check_parallelism(self.trainer.strategy, type(self.strategy).__name__, reason)
        if shards(self.trainer.strategy):
            callbacks.insert(0, EvenValidation())
        callbacks.insert(0, EncoderFirst())
        self.strategy.adopted = True
        return [self.strategy]

    def check_run(self, stage: str) -> None:
        """Raises an error for data, parallelism and callbacks that do not fit, before any long work."""
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
            if self._checkpoint_to_load is not None and not self.is_fitting:
                return  # so does the checkpoint that is to be scored or to predict
            self.build(target)
        elif target is not None:
            self._take_target(target)
        if self.is_fitting:
            self.take_teacher()
        if self.is_fitting and not self.strategy.has_prepared(self):
            self.strategy.prepare(self.trainer, self)
            self.strategy.mark_prepared(self)
            self._prepared_layout = read_layout(self.encoder)
        if self.is_fitting and shards(self.trainer.strategy):
            assert self.device_mesh is not None
            shard_(self.encoder, self.device_mesh["data_parallel"])

    def why_not_sharded(self) -> str:
        """Why the encoder cannot be divided among processes in the coming run; empty where it can."""
        if not self.is_fitting:
            return "parameters are divided for training alone, in the verb fit"
        if self.distillation is not None:
            return "a teacher beside a divided model has not been tried"
        if self._checkpoint_to_load is not None:
            return RESUMED
        return ""

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

    def _take_target(self, target: TargetSpec) -> None:
        """Takes the data's target for an encoder that was built before, if its head fits."""
        built = SavedModel("the encoder that the task holds", self.encoder.config, ModelLayout({}), {}, self.target)
        check_same_target(built, target)
        if self.target is None:
            for name, value in self._head_config(target).items():
                setattr(self.encoder.config, name, value)
        self.target = target

    def _target_of_data(self) -> TargetSpec | None:
        """What the data of the run ask for, as far as they know."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, AdoptsTarget) and not datamodule.knows_target:
            return None
        if not isinstance(datamodule, HasTarget):
            return None
        check_kind(self, datamodule.target)
        return datamodule.target

    def _head_config(self, target: TargetSpec | None) -> dict[str, Any]:
        """Fields of the encoder's configuration that depend on the labels."""
        if target is None or target.kind in LANGUAGE_MODELLING:
            return {}
        if target.kind == "regression":
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(target.label_names))
        return {"id2label": names, "label2id": {name: index for index, name in names.items()}}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Moves or converts the module, as everything does that Lightning asks of it; see `computed_as_before`."""
        with computed_as_before(self):
            return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    # Steps.

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of a batch; `labels` in it are ignored."""
        logits: Tensor = self.encoder(**self.model_inputs(batch)).logits
        return logits

    def model_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """All of a batch but its `labels`."""
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def per_sample_losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Losses `[b]` of a batch's samples, each as if it were alone; float32."""
        return self.losses(self(batch).float(), batch["labels"])

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Predictions of a batch; its labels, if it has any; logits, unless there is a prediction per token."""
        del batch_idx
        logits = self(batch).float()
        finite_scores.check_predictions(self, batch, logits)
        result = {"prediction": self.predictions(logits)}
        if result["prediction"].ndim == 1:
            # One row per token and class, kept for all batches, would fill the memory.
            result["logits"] = logits
        return result | {name: batch[name] for name in ("labels",) if name in batch}

    def on_test_start(self) -> None:
        """Tells when a strategy is configured and the model that is scored is dense all the same."""
        if not isinstance(self.strategy, NoCompression) and not read_layout(self.encoder).modules:
            name = type(self.strategy).__name__
            logger.warning("test scores a dense model although the strategy is %s: give a compressed checkpoint", name)


_DEFAULT_OPTIMIZER = inspect.signature(EncoderTask).parameters["optimizer"].default
