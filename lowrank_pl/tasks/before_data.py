"""What is checked before data are prepared: plans need shapes alone, and many data know their kind without reading."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from transformers import PreTrainedModel

from lowrank_pl.checkpoint import (
    LAYOUT_KEY,
    SavedModel,
    check_readable,
    is_quantized,
    outline,
    read_saved_model,
    saved_config,
)
from lowrank_pl.contract import (
    LANGUAGE_MODELLING,
    AdoptsTarget,
    ForetellsTarget,
    HasTokenizer,
    KnowsItsLength,
    TargetKind,
    TargetSpec,
)
from lowrank_pl.errors import LowRankError
from lowrank_pl.errors.checkpoint import QuantizedModelError
from lowrank_pl.errors.pretrained import FactorisedFolderError, ModelFolderError, VocabularySizeError
from lowrank_pl.errors.run import TargetKindError
from lowrank_pl.errors.targets import AlreadyFactorisedError
from lowrank_pl.hub import check_supported, load_config, require_weights
from lowrank_pl.strategies import CompressionStrategy
from lowrank_pl.surgery import CompressionRecord
from lowrank_pl.tasks import teaching
from lowrank_pl.tasks.callbacks import check_monitor_modes
from lowrank_pl.tasks.compatibility import check_same_target
from lowrank_pl.tasks.distillation import Distillation

logger = logging.getLogger(__name__)

_FEW, _MANY = 1, 1 << 16
"""Outputs of a head whose number of labels is not known yet."""


class Task(Protocol):
    """What is asked of an `EncoderTask`, which imports this module."""

    auto_class: ClassVar[Any]
    kinds: ClassVar[tuple[TargetKind, ...]]
    pretrained: str | None
    init_from: str | None
    strategy: CompressionStrategy
    distillation: Distillation | None
    encoder: PreTrainedModel
    target: TargetSpec | None
    compression: CompressionRecord | None

    @property
    def is_built(self) -> bool:
        """Whether the encoder exists yet."""
        ...

    def _head_config(self, target: TargetSpec | None) -> dict[str, Any]: ...


def check_before_data(task: Task, trainer: pl.Trainer, ckpt_path: str | None = None) -> None:
    """Raises an error for data of another kind, a monitor of the worst model, and an impossible plan.

    Args:
        task: The task.
        trainer: Of the run.
        ckpt_path: A checkpoint that the run takes the model from.

    Raises:
        TargetKindError: the task does not predict what the data ask for.
        UnsupportedModelError, NotADecoderError: nor does the architecture.
        FactorisedFolderError: an exported folder is given as what the model starts from dense.
        VocabularySizeError: the data's tokenizer has tokens that the model does not know.
        MaxLengthError: samples may be longer than the model has positions.
        MonitorModeError: see `check_monitor_modes`.
        TeacherError: the teacher of a distillation cannot teach this model.
        ResumeMismatchError: the run that is resumed learned from another.
        LowRankError: weights that are not there or predict something else, and whatever the strategy's plan raises.
    """
    datamodule = getattr(trainer, "datamodule", None)
    expected = datamodule.expected_target if isinstance(datamodule, ForetellsTarget) else None
    if expected is not None:
        check_kind(task, expected)
    fitting = trainer.state.fn == TrainerFn.FITTING
    if fitting and task.is_built:
        _check_float(task.encoder, "fit")
    if fitting and not task.is_built:
        check_monitor_modes(trainer, expected)
    if not task.is_built and task.init_from is None and task.pretrained is not None and (fitting or not ckpt_path):
        try:
            config = load_config(task.pretrained)
        except ModelFolderError:
            require_weights(task.pretrained)  # what lacks both is told by its weights
            raise
        _check_not_exported(task.pretrained, config)
        check_supported(task.auto_class, task.pretrained, config)
        require_weights(task.pretrained)
    if not task.is_built and task.init_from is not None and not (fitting or ckpt_path):
        check_readable(task.init_from)  # fit reads it below
    _check_fits_model(task, datamodule, ckpt_path)
    if fitting and ckpt_path is not None and Path(ckpt_path).is_file():  # a remote one Lightning reads later
        teaching.check_resumed_before_data(task.distillation, task.auto_class, ckpt_path)
    if not fitting or task.is_built:
        return
    if task.distillation is not None:
        teaching.check_before_data(task.distillation, task.auto_class, task.pretrained, task.init_from, expected)
    check_plan(task, task.strategy.plan, expected=expected)


def _check_not_exported(name: str, config: Any) -> None:
    """Raises `FactorisedFolderError` for the configuration of a folder that `export` has written with factors."""
    if hasattr(config, LAYOUT_KEY):
        raise FactorisedFolderError(name)


def _check_fits_model(task: Task, datamodule: Any, ckpt_path: str | None) -> None:
    """Raises an error for tokens that the model has no embedding for, and for samples beyond its positions."""
    if not isinstance(datamodule, HasTokenizer | KnowsItsLength):
        return
    config, source = None, ckpt_path or task.init_from or task.pretrained
    if ckpt_path is None and task.is_built:
        config, source = task.encoder.config, type(task.encoder).__name__
    elif ckpt_path is not None or task.init_from is not None:
        config = saved_config(str(source))
    elif task.pretrained is not None:
        config = load_config(task.pretrained)
    size = getattr(config, "vocab_size", None)
    if isinstance(datamodule, HasTokenizer) and isinstance(size, int):
        words = datamodule.load_tokenizer()
        if len(words) > size:
            raise VocabularySizeError(words.name_or_path, len(words), str(source), size)
    if isinstance(datamodule, KnowsItsLength) and config is not None:
        datamodule.check_positions(config, source)


def check_kind(task: Task, target: TargetSpec) -> None:
    """Raises `TargetKindError` unless a task predicts what data ask for."""
    if target.kind not in task.kinds:
        raise TargetKindError(type(task).__name__, task.kinds, target.name, target.kind)


def check_plan(
    task: Task,
    plan: Callable[[nn.Module], object],
    ckpt_path: str | None = None,
    expected: TargetSpec | None = None,
) -> None:
    """Tries a plan on the shapes of the encoder that a run will have; weights are neither made nor changed.

    Args:
        task: The task.
        plan: Raises where something is impossible.
        ckpt_path: A checkpoint that the run takes its encoder from.
        expected: What is predicted, as far as it is known.

    Raises:
        LowRankError: what the plan raises, and what is wrong with a checkpoint or a configuration.
    """
    if ckpt_path is None and task.is_built:
        _check_float(task.encoder, "compression")
        _try(plan, task.encoder, task.compression)
        return
    refused: list[LowRankError] = []
    try:
        for encoder, record in _outlines(task, ckpt_path, expected):
            try:
                _try(plan, encoder, record)
                return
            except LowRankError as error:
                refused.append(error)
    except LowRankError:
        raise
    except (NotImplementedError, RuntimeError, ValueError) as error:
        # A model, or a strategy of somebody else, that needs values: what is impossible is found when they are there.
        logger.debug("no plan of %s before the data: %s", type(task.strategy).__name__, error)
        return
    # With a small and a large head alike: then it is not the head that decides.
    if len({type(error) for error in refused}) == 1:
        raise refused[0]


def _try(plan: Callable[[nn.Module], object], encoder: nn.Module, record: CompressionRecord | None) -> None:
    """Tries a plan; where it fails as a part is factorised already, the record tells by what."""
    try:
        plan(encoder)
    except AlreadyFactorisedError as error:
        raise (error if record is None else error.made_by(record.method, record.keep_ratio)) from None


def shapes_of(task: Task) -> nn.Module | None:
    """The encoder without values, of a task that starts from a folder without weights; `None` for any other.

    Raises:
        FactorisedFolderError: it starts from an exported folder as if that were a dense model.
    """
    if task.is_built or task.init_from is not None or task.pretrained is None:
        return None
    try:
        require_weights(task.pretrained)
        _check_not_exported(task.pretrained, load_config(task.pretrained))
    except ModelFolderError:
        config = load_config(task.pretrained)
        check_supported(task.auto_class, task.pretrained, config)
        return outline(task.auto_class, config)
    return None


def _outlines(
    task: Task, ckpt_path: str | None, expected: TargetSpec | None
) -> Iterator[tuple[nn.Module, CompressionRecord | None]]:
    """The encoder without values, and how it was compressed.

    Twice, with a small and a large head, where the data are yet to tell the labels.
    """
    source = ckpt_path or task.init_from
    if source is not None:
        saved = read_saved_model(source, "init_from" if ckpt_path is None else "--ckpt_path")
        saved.check_float("training or compression")
        if expected is not None and _is_complete(expected):
            check_same_target(saved, expected)
        yield outline(task.auto_class, saved.config, saved), saved.compression
    elif task.pretrained is not None:
        if expected is not None and _is_complete(expected):
            heads: list[dict[str, Any]] = [task._head_config(expected)]
        else:
            heads = [{"num_labels": count} for count in (_FEW, _MANY)]
        for head in heads:
            yield outline(task.auto_class, load_config(task.pretrained, **head)), None


def _check_float(encoder: nn.Module, asked_by: str) -> None:
    """Raises `QuantizedModelError` for a model in eight bits."""
    if is_quantized(encoder):
        raise QuantizedModelError(type(encoder).__name__, asked_by)


def _is_complete(target: TargetSpec) -> bool:
    return bool(target.label_names) or target.kind in ("regression", *LANGUAGE_MODELLING)


def tell_target(task: Task, datamodule: Any, ckpt_path: str | None = None) -> None:
    """Tells data that have no training split what the model predicts, if they take it and the model knows.

    Args:
        task: The task.
        datamodule: The data of the run.
        ckpt_path: A checkpoint that the run takes the model from.
    """
    if not isinstance(datamodule, AdoptsTarget) or not datamodule.lacks_target:
        return
    source = ckpt_path or (None if task.is_built else task.init_from)
    if source is None:
        target = task.target
    else:
        saved = read_saved_model(source, "init_from" if ckpt_path is None else "--ckpt_path")
        target = saved.target or _target_of_head(saved, datamodule)
    if target is not None:
        datamodule.adopt_target(target)


def _target_of_head(saved: SavedModel, datamodule: Any) -> TargetSpec | None:
    """What a Hugging Face folder tells: as many classes as it has names for, or one value."""
    problem = getattr(saved.config, "problem_type", None)
    if saved.label_names:
        return TargetSpec(type(datamodule).__name__, "classification", saved.label_names)
    return TargetSpec(type(datamodule).__name__, "regression", (), ("pearson",)) if problem == "regression" else None
