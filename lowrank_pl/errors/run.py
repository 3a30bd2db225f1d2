"""What can be wrong with a run: its trainer and callbacks, calibration, and what it needs or leaves."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence

from lowrank_pl.errors.base import LowRankError


class StrategyPlacementError(LowRankError):
    """A compression strategy stands under `trainer.callbacks`."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} stands under trainer.callbacks, where it would run without having prepared the model's "
            "shapes, and the model has another. A compression strategy belongs to a model that takes one: move it to "
            "model.init_args.strategy."
        )


class NotCompressibleError(LowRankError):
    """A LightningModule lacks what a strategy has to touch."""

    def __init__(self, module: str, asked_by: str, missing: str) -> None:
        super().__init__(
            f"{asked_by} cannot work on {module}: it has no {missing!r}. A LightningModule has to offer `encoder`, the "
            "model to compress, made in __init__ or configure_model, and, for methods that measure, "
            "`per_sample_losses(batch)`, one loss per sample. Add what is missing; docs/own_module.md has an example."
        )


class CalibrationError(LowRankError):
    """A method needs calibration data and there is none."""

    def __init__(self, strategy: str, problem: str) -> None:
        super().__init__(
            f"{strategy} needs calibration batches: {problem}. Allowed is a datamodule with "
            "calibration_batches(), such as every class of lowrank_pl.data; pass it as datamodule=, or batches to "
            "lowrank_pl.compress."
        )


class FewSamplesError(LowRankError):
    """A process has no calibration sample, and would leave the others waiting."""

    def __init__(self, asked_by: str, samples: int, processes: int) -> None:
        super().__init__(
            f"{asked_by} needs a calibration sample on every process, and there are {samples} for {processes} of them. "
            f"Set calibration.max_samples to {processes} or more if the training data have as many, or use fewer "
            "processes (--trainer.devices)."
        )


class ResumeMismatchError(LowRankError):
    """A checkpoint to resume from was written with other ranks or targets, or with another teacher."""

    def __init__(
        self,
        difference: str,
        what: str = "the checkpoint's factorised layers differ from what the strategy prepared",
    ) -> None:
        super().__init__(
            f"--ckpt_path resumes a run, but {what}: {difference}. Resume with the run's own configuration (its "
            "config.yaml), or start a new run from the weights with --model.init_args.init_from."
        )

    @classmethod
    def of_teacher(cls, difference: str) -> ResumeMismatchError:
        """The error for a run that learned from something else."""
        return cls(difference, "it learned from something else than model.init_args.distillation says")


class TargetKindError(LowRankError):
    """Data and task do not predict the same kind of thing."""

    def __init__(self, task: str, allowed: tuple[str, ...], data: str, given: str) -> None:
        classes = {"masked_lm": "TextCorpus", "causal_lm": "CausalText"}
        others = [name for kind, name in classes.items() if kind in allowed]
        super().__init__(
            f"{data!r} is a {given} data set, and {task} handles {' and '.join(allowed)}. Choose the model class "
            "that fits: SequenceClassification (classification and regression), TokenClassification, MaskedLM, "
            f"CausalLM{f'; or the data {others[0]} for {task}' if others else ''}."
        )


class EngineError(LowRankError):
    """An engine of `benchmark` cannot run on this machine."""

    def __init__(self, engine: str, device: str, reason: str, needs: str) -> None:
        super().__init__(
            f"--engines {engine} cannot run on {device}: {reason}. It needs {needs}. Install that, or leave {engine} "
            "out of --engines."
        )


class NotOfTextsAloneError(LowRankError):
    """A model that `benchmark` cannot run: it makes token ids and a mask, and nothing else.

    Args:
        kind: The model's class.
        problem: What is in the way.
    """

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(
            f"--models names a {kind}, which does not run on texts alone ({problem}). Allowed are models that take "
            "input_ids and attention_mask of [batch, length], as encoders and decoders with their usual heads do: "
            "leave it out of --models."
        )


class BenchmarkResumeError(LowRankError):
    """A folder holds no benchmark that `--resume` could go on with."""

    def __init__(self, folder: str, problem: str) -> None:
        super().__init__(
            f"--resume cannot go on in {folder!r}: {problem}. Times are only compared if they were taken in the same "
            "circumstances; repeat the command of the first run (it is in benchmark.json), or give a new --output "
            "without --resume."
        )


class MissingPackagesError(LowRankError):
    """Packages of an optional extra are not installed."""

    def __init__(self, what: str, names: Sequence[str], extra: str) -> None:
        listed = ", ".join(repr(name) for name in names)
        super().__init__(
            f"{what} needs packages that are not installed: {listed}. They come with the extra {extra!r}: "
            f'pip install "lowrank-pl[{extra}]".'
        )


class ScoreDropError(LowRankError):
    """An exported file scores worse than the model by more than is allowed."""

    def __init__(self, metric: str, before: float, after: float, drop: float, allowed: float, samples: int) -> None:
        super().__init__(
            f"the exported file scores {after:.4f} and the model {before:.4f} ({metric}, {samples:,} samples of the "
            f"validation split): worse by {drop:.4f}, allowed is max_drop={allowed:g}; nothing was written. Raise "
            "--max_drop, or leave --quantize out."
        )


class NotFactorisedError(LowRankError):
    """A model that should be scored as compressed has no factorised layer."""

    def __init__(self, strategy: str, names: list[str]) -> None:
        super().__init__(
            f"{strategy} has run, yet {len(names)} targeted layers are not factorised, e.g. {names[0]!r}; "
            "scoring them would report a dense score as a compressed one. This is a bug: please report it."
        )


class MonitorModeError(LowRankError):
    """A callback would keep, or wait for, the worst model."""

    def __init__(self, callback: str, monitor: str, mode: str, wanted: str, task: str) -> None:
        article = "an" if callback[0] in "AEIOU" else "a"
        super().__init__(
            f"{article} {callback} monitors {monitor!r} with mode={mode!r}, which would take the worst model for the "
            f"best: the score of {task!r} is best at its {wanted}imum. Set the callback's mode to {wanted!r}."
        )


class NothingToScoreError(LowRankError):
    """`compress` was told to look at no validation batch."""

    def __init__(self) -> None:
        super().__init__(
            "compress scores the model before and after on the validation split, and trainer.limit_val_batches=0 "
            "leaves nothing of it. Allowed are any batches at all; remove the setting."
        )


class NothingToCompressError(LowRankError):
    """`compress` was asked of a strategy that cannot compress without training."""

    def __init__(self, strategy: str) -> None:
        super().__init__(
            f"compress was called with strategy {strategy}, which factorises nothing by itself. Allowed are the static "
            "methods: set --model.init_args.strategy to KroneckerSVD, FWSVD or SVD, with keep_ratio or rank_ratio."
        )


class UnsupportedCallbackError(LowRankError):
    """A callback does to a model what factorised layers or checkpoints of this package cannot follow."""

    def __init__(self, callback: str, problem: str, remedy: str) -> None:
        super().__init__(f"{callback} cannot be used here: {problem}. {remedy}")


class RunStoppedError(LowRankError):
    """A signal has ended a run before its end.

    Args:
        verb: What was stopped.
        number: The signal.
        steps: Optimizer steps that were done, of a training.
        checkpoint: The last one that the training has written or was resumed from; `None` without any.
        notes: What else the model lacks, in short sentences without a full stop.
        kept: Where what is finished is, if the same command goes on from there.

    Attributes:
        code: The exit code, 128 and the signal's number, as a shell reports it.
    """

    def __init__(
        self,
        verb: str,
        number: int,
        steps: int | None = None,
        checkpoint: str | None = None,
        notes: Sequence[str] = (),
        kept: str | None = None,
    ) -> None:
        self.code = 128 + number
        told = f"{verb} was stopped by {signal.Signals(number).name}"
        if kept is not None:
            super().__init__(f"{told} before its end. {kept!r} keeps what is finished: the same command goes on there.")
            return
        if steps is None:
            super().__init__(f"{told} before its end; what it would have written is not there. Start it again.")
            return
        if checkpoint is None:
            remedy = "No checkpoint has been written: start the run again."
        else:
            remedy = (
                f"The last checkpoint is {checkpoint!r}: the same command with --ckpt_path={shlex.quote(checkpoint)} "
                "goes on from it."
            )
        lacks = "".join(f"; {note}" for note in notes)
        super().__init__(f"{told} after optimizer step {steps:,}, before its end{lacks}. {remedy}")


class FrozenFactorsError(LowRankError):
    """Layers whose ranks should shrink in training are not trained."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(
            f"{len(names)} targeted layers are frozen (requires_grad=False), e.g. {names[0]!r}: without gradients "
            "their singular groups cannot be scored. Allowed are trainable layers; unfreeze them, or exclude them "
            "through model.init_args.strategy.init_args.targets.exclude."
        )


class EmbeddingsError(LowRankError):
    """The vocabulary is to be factorised by what cannot do that."""

    def __init__(self, asked_of: str, reason: str) -> None:
        super().__init__(
            f"targets.embeddings=True was asked of {asked_of}, which does not factorise the vocabulary: {reason}. "
            "Allowed are KroneckerSVD and SVD, with a budget in Parameters. Set "
            "model.init_args.strategy.init_args.targets.init_args.embeddings to false, or use one of them."
        )
