"""Runs: trainers, callbacks, output folders, calibration."""

from __future__ import annotations

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

    def __init__(self, path: str, remedy: str = "Give another --output, or move the folder away.") -> None:
        super().__init__(
            f"the output folder {path!r} exists and is not empty; nothing is ever overwritten unasked. {remedy}"
        )


class StrategyPlacementError(LowRankError):
    """A compression strategy stands under `trainer.callbacks`."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} stands under trainer.callbacks, where it would run without having prepared the model's "
            "shapes. A compression strategy belongs to the model: move it to model.init_args.strategy."
        )


class UnsupportedParallelismError(LowRankError):
    """The trainer shards parameters, which the strategies cannot factorise."""

    def __init__(self, strategy: str, given: str) -> None:
        super().__init__(
            f"{strategy} cannot work under {given}: it needs whole weight matrices on every process. "
            "Allowed are a single device and DDP. Set trainer.strategy to 'auto' or 'ddp'."
        )


class CalibrationError(LowRankError):
    """A method needs calibration data and there is none."""

    def __init__(self, strategy: str, problem: str) -> None:
        super().__init__(
            f"{strategy} needs calibration batches: {problem}. Allowed is a datamodule with "
            "calibration_batches(), such as every class of lowrank_pl.data; pass it as datamodule=."
        )


class ResumeMismatchError(LowRankError):
    """A checkpoint to resume from was written with other ranks or targets."""

    def __init__(self, difference: str) -> None:
        super().__init__(
            f"--ckpt_path resumes a run, but the checkpoint's factorised layers differ from what the "
            f"strategy prepared: {difference}. Resume with the run's own configuration (its config.yaml), or "
            "start a new run from the weights with --model.init_args.init_from."
        )


class TargetKindError(LowRankError):
    """Data and task do not predict the same kind of thing."""

    def __init__(self, task: str, allowed: tuple[str, ...], data: str, given: str) -> None:
        super().__init__(
            f"{data!r} is a {given} data set, and {task} handles {' and '.join(allowed)}. Choose the model class "
            "that fits: SequenceClassification (classification and regression), TokenClassification, MaskedLM."
        )


class MissingArgumentError(LowRankError):
    """Something has to be said and was not."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what} is missing. {remedy}")


class MissingPackagesError(LowRankError):
    """Packages of an optional extra are not installed."""

    def __init__(self, what: str, names: Sequence[str], extra: str) -> None:
        listed = ", ".join(repr(name) for name in names)
        super().__init__(
            f"{what} needs packages that are not installed: {listed}. They come with the extra {extra!r}: "
            f'pip install "lowrank-pl[{extra}]".'
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


class MonitorModeError(LowRankError):
    """A checkpoint callback would keep the worst model."""

    def __init__(self, monitor: str, mode: str, wanted: str, task: str) -> None:
        super().__init__(
            f"a ModelCheckpoint monitors {monitor!r} with mode={mode!r}, which would keep the worst model: the "
            f"score of {task!r} is best at its {wanted}imum. Set the callback's mode to {wanted!r}."
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
            "methods: set --model.init_args.strategy to SVD or FWSVD, with keep_ratio or rank_ratio."
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


class BudgetNotReachedError(LowRankError):
    """A run has ended before its ranks had shrunk to the budget."""

    def __init__(self, kept: int, budget: int, steps: int, total: int, unit: str = "parameters") -> None:
        super().__init__(
            f"the run ended after {steps} of {total} optimizer steps, before its budget was reached: the targeted "
            f"weights cost {kept:,} {unit}, the budget is {budget:,}. The report and the checkpoints are written, "
            "but the model is larger than asked. Resume with --ckpt_path, or shorten the run with "
            "trainer.max_epochs or .max_steps so that the schedule fits into it."
        )


class FrozenFactorsError(LowRankError):
    """Layers whose ranks should shrink in training are not trained."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(
            f"{len(names)} targeted layers are frozen (requires_grad=False), e.g. {names[0]!r}: without gradients "
            "their singular groups cannot be scored. Allowed are trainable layers; unfreeze them, or exclude them "
            "through model.init_args.strategy.init_args.targets.exclude."
        )
