"""Runs: trainers, callbacks, output folders, calibration."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Sequence

from lowrank_pl.errors.base import LowRankError


class OutputNotWritableError(LowRankError):
    """An output folder cannot be made."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"the output folder {path!r} cannot be made ({reason}). Give an --output that can be written, on a disk "
            "that has room for it."
        )


class OutputExistsError(LowRankError):
    """An output folder already holds something."""

    def __init__(self, path: str, remedy: str | None = None) -> None:
        super().__init__(
            f"the output folder {path!r} exists and is not empty; nothing is ever overwritten unasked. "
            f"{remedy or 'Give another --output, or move the folder away.'}"
        )


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


class UnsupportedParallelismError(LowRankError):
    """The trainer runs the model in a way that factorised layers do not survive, or that is not tested with them."""

    def __init__(self, strategy: str, given: str, reason: str) -> None:
        super().__init__(
            f"{strategy} cannot work under trainer.strategy {given}: {reason}. Allowed are a single device and DDP "
            "itself, not its subclasses, and to train what is factorised by a static method, or as it is, also "
            "ModelParallelStrategy (FSDP2, configs/trainer/fsdp2.yaml). Set trainer.strategy to 'auto' or 'ddp'; "
            "docs/multi_gpu.md says what each needs."
        )


class UnevenValidationError(LowRankError):
    """A process has nothing to validate while others have."""

    def __init__(self, rank: int, processes: int) -> None:
        super().__init__(
            f"process {rank} of {processes} has no sample of the validation split, and in the forward passes of a "
            "divided model all processes take part. Allowed are at least as many samples as processes: give more "
            "validation data, or set trainer.strategy to 'ddp'."
        )


class StartMethodError(LowRankError):
    """DDP is asked for in processes that would take the trained model away with them."""

    def __init__(self, strategy: str, method: str) -> None:
        super().__init__(
            f"{strategy} cannot work with processes started by {method!r} (ddp_{method}, ddp_notebook): the encoder is "
            "built inside them, and the process that started them would go on with an untrained one. Allowed are "
            "trainer.strategy 'ddp', which starts the program once per device, and a single device. In a notebook set "
            "trainer.devices to 1, or write the run to a file and start that with trainer.strategy 'ddp'."
        )


class ProcessFailedError(LowRankError):
    """Another process of the same run has failed."""

    def __init__(self, rank: int, problem: str) -> None:
        super().__init__(
            f"process {rank} of this run has failed: {problem.rstrip('.')}. This process ends with it, because neither "
            "can go on alone. Mend what that message names, and start the run again."
        )


class RunFolderInUseError(LowRankError):
    """The folder of a run holds another run already."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"the run folder {path!r} holds the configuration of another run; nothing is ever overwritten unasked. "
            "Give another --trainer.logger.init_args.version, leave it out to get the next free number, or move the "
            "folder away."
        )


class CalibrationError(LowRankError):
    """A method needs calibration data and there is none."""

    def __init__(self, strategy: str, problem: str) -> None:
        super().__init__(
            f"{strategy} needs calibration batches: {problem}. Allowed is a datamodule with "
            "calibration_batches(), such as every class of lowrank_pl.data; pass it as datamodule=, or batches to "
            "lowrank_pl.compress."
        )


class LabelsError(LowRankError):
    """The samples that a method calibrates on have no labels, and none can be drawn.

    Args:
        task: The class of the task.
        problem: What is missing.
        instead: The value of `calibration.labels` that would do; empty if none would.
    """

    def __init__(self, task: str, problem: str, instead: str = "") -> None:
        key = "model.init_args.strategy.init_args.calibration.labels"
        meaning = {"observed": "take those of the data", "sampled": "draw them from what the model predicts"}
        remedy = f"Set {key} to {instead!r} to {meaning[instead]}" if instead else "Give data that have labels"
        super().__init__(
            f"{task} cannot be calibrated: {problem}. {remedy}, or use a method that measures nothing, such as SVD."
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


class MissingArgumentError(LowRankError):
    """Something has to be said and was not."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what} is missing. {remedy}")


class ExclusiveArgumentsError(LowRankError):
    """Of some arguments that say one thing in several ways, none or several were given.

    Args:
        names: The arguments.
        given: Those that were given.
        where: The key above them, as in YAML.
    """

    def __init__(self, names: Sequence[str], given: Sequence[str], where: str) -> None:
        listed = ", ".join(names)
        if given:
            what = f"{' and '.join(given)} are given together; allowed is exactly one of {listed}"
            remedy = f"Set the others to null, e.g. --{where}.{given[0]}=null."
        else:
            what = f"none of {listed} is given; allowed is exactly one of them"
            remedy = f"Set it as {where}.{names[0]}, for example."
        super().__init__(f"{what}. {remedy}")


class ConstructionError(LowRankError):
    """A class of the configuration rejects its arguments, or needs what is not installed.

    Args:
        reason: What it said.
        name: The class, if that is known.
        remedy: What to do.
    """

    def __init__(self, reason: str, name: str | None, remedy: str) -> None:
        what = f"{name} cannot be made" if name else "the run cannot be set up"
        super().__init__(f"{what} as configured: {' '.join(reason.split()).rstrip('.')}. {remedy}")

    @classmethod
    def of(cls, error: BaseException) -> ConstructionError:
        """From what was raised, which may name the class in a message about all types that were tried."""
        named = re.findall(r"Problem with given class_path '([^']+)':\s*(.*)", str(error))
        path, reason = named[-1] if named else ("", str(error))
        package = re.search(r"not met|No module named|not installed|pip install", reason)
        remedy = "Install the package, or choose another class." if package else "Check the arguments (--print_config)."
        return cls(reason, path.rpartition(".")[2] or None, remedy)


class InterpolationError(LowRankError):
    """A value refers to a variable."""

    def __init__(self, key: str, value: str, variable: str) -> None:
        super().__init__(
            f"{key}={value!r} contains {variable}; variables are not filled in within configurations. Write the value "
            f'out (~ is your home folder), or give it on the command line, where the shell fills it in: --{key} "…".'
        )


class OptimizerArgumentsError(LowRankError):
    """An optimizer rejects its arguments."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the optimizer refuses its arguments: {reason.strip().rstrip('.')}. Check model.init_args.optimizer."
        )


class EngineError(LowRankError):
    """An engine of `benchmark` cannot run on this machine."""

    def __init__(self, engine: str, device: str, reason: str, needs: str) -> None:
        super().__init__(
            f"--engines {engine} cannot run on {device}: {reason}. It needs {needs}. Install that, or leave {engine} "
            "out of --engines."
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


class OptimizerCoverageError(LowRankError):
    """The optimizer lacks trainable parameters of the model."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(
            f"the optimizer does not hold {len(names)} trainable parameters, e.g. {names[0]!r}: they would never be "
            "updated. Every parameter with requires_grad must be in it; freeze what should not train, and build the "
            "optimizer in configure_optimizers, after configure_model."
        )


class OptimizerStateError(LowRankError):
    """An optimizer keeps something of a layer that cannot be divided among its singular groups."""

    def __init__(self, optimizer: str, name: str, shape: str) -> None:
        super().__init__(
            f"{optimizer} keeps {name!r} of shape {shape} for the factors, of which nobody can say which part "
            "belongs to which singular group. Allowed are optimizers whose state has the shape of the parameter or "
            "is a single number, such as AdamW, Adam, SGD, RMSprop, Lion. Set model.init_args.optimizer to one."
        )


class HiddenOptimizerStateError(LowRankError):
    """An optimizer keeps its state of a layer where it cannot be moved along with the layer's groups."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(
            f"{optimizer} has taken steps, yet it shows no state for some of the factors it updates, while it keeps "
            "some elsewhere: momentum would end up at other singular groups. Allowed are optimizers, and wrappers "
            "around one torch optimizer, whose `state` holds every parameter. Set model.init_args.optimizer to one."
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


class ScheduleError(LowRankError):
    """A schedule of ranks does not fit the run."""

    def __init__(self, given: str, problem: str, allowed: str) -> None:
        super().__init__(
            f"{given} {problem}; allowed are {allowed}. Change model.init_args.strategy.init_args.schedule, or "
            "trainer.max_epochs or .max_steps."
        )


class BudgetAboveStartError(LowRankError):
    """There would be nothing to prune."""

    def __init__(self, budget: int, start: int, start_ratio: float, unit: str = "parameters") -> None:
        super().__init__(
            f"the budget of {budget:,} {unit} for the targeted weights is above the {start:,} that the run would "
            f"start with at start_ratio={start_ratio!r}: no singular group would ever be dropped. "
            "Allowed is a budget up to that. Lower keep_ratio, or raise start_ratio."
        )


class NoTrainingStepError(LowRankError):
    """A run has no step, and the method works only from the first one on."""

    def __init__(self, strategy: str) -> None:
        super().__init__(
            f"{strategy} was given a run without a single optimizer step, which would leave the model unfinished: "
            "factors are written, and ranks shrink, when training starts. Allowed is one step at least: look at "
            "trainer.max_epochs, .max_steps and .limit_train_batches, and use a new Trainer for a new run. A static "
            "method factorises without training in the verb compress."
        )


class AlreadyCompactedError(LowRankError):
    """A run that ended before its budget is to go on with what is left of it in memory."""

    def __init__(self, strategy: str, kept: int, budget: int, unit: str) -> None:
        super().__init__(
            f"{strategy} was asked to train on a model that it has compacted already, at {kept:,} {unit} where the "
            f"budget is {budget:,}: an earlier run ended too early, and ranks cannot shrink any more. Allowed is to "
            "resume that run, fit(..., ckpt_path=its last checkpoint), or to start anew with a new task."
        )


class UnsupportedCallbackError(LowRankError):
    """A callback does to a model what factorised layers or checkpoints of this package cannot follow."""

    def __init__(self, callback: str, problem: str, remedy: str) -> None:
        super().__init__(f"{callback} cannot be used here: {problem}. {remedy}")


class BudgetNotReachedError(LowRankError):
    """A run has ended before its ranks had shrunk to the budget."""

    def __init__(self, kept: int, budget: int, steps: int, total: int, unit: str = "parameters") -> None:
        super().__init__(
            f"the run ended after {steps} of {total} optimizer steps, before its budget was reached: the targeted "
            f"weights cost {kept:,} {unit}, the budget is {budget:,}. The report and the checkpoints are written, "
            "but the model is larger than asked. Resume with --ckpt_path, or shorten the run with "
            "trainer.max_epochs or .max_steps so that the schedule fits into it."
        )


class RunStoppedError(LowRankError):
    """A signal has ended a run before its end.

    Args:
        verb: What was stopped.
        number: The signal.
        steps: Optimizer steps that were done, of a training.
        checkpoint: The last one that the training has written or was resumed from; `None` without any.
        notes: What else the model lacks, in short sentences without a full stop.

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
    ) -> None:
        self.code = 128 + number
        told = f"{verb} was stopped by {signal.Signals(number).name}"
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


class AllocationError(LowRankError):
    """Ranks are to follow the loss, and the method knows nothing of it."""

    def __init__(self, allocation: str, strategy: str, reason: str) -> None:
        super().__init__(
            f"allocation {allocation} was asked of {strategy}, which cannot say what a singular group is worth to the "
            f"loss: {reason}. Allowed are KroneckerSVD (side both or output), FWSVD (side both or output) and TFWSVD. "
            "Set model.init_args.strategy.init_args.allocation to Uniform, or use one of them."
        )


class BlocksMismatchError(LowRankError):
    """A folder with the blocks that an interrupted run has finished belongs to another run."""

    def __init__(self, folder: str, key: str, theirs: str | None, ours: str | None) -> None:
        what = {"model": "another model", "data": "other calibration samples", "loss": "another loss"}
        told = what.get(key, f"{key}={theirs or 'nothing'}, here it is {ours or 'nothing'}")
        super().__init__(
            f"{folder!r} holds the finished blocks of a run that was stopped, and that run had {told}. Allowed is the "
            "run that began there, with the same model, data and options, which goes on where it was. Start it as it "
            "was, give another --output, or remove the folder."
        )
