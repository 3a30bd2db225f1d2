"""What can be wrong with a budget, how it is allocated, and when it is reached."""

from __future__ import annotations

from lowrank_pl.errors.base import LowRankError


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


class BudgetNotReachedError(LowRankError):
    """A run has ended before its ranks had shrunk to the budget."""

    def __init__(self, kept: int, budget: int, steps: int, total: int, unit: str = "parameters") -> None:
        super().__init__(
            f"the run ended after {steps} of {total} optimizer steps, before its budget was reached: the targeted "
            f"weights cost {kept:,} {unit}, the budget is {budget:,}. The report and the checkpoints are written, "
            "but the model is larger than asked. Resume with --ckpt_path, or shorten the run with "
            "trainer.max_epochs or .max_steps so that the schedule fits into it."
        )


class AllocationError(LowRankError):
    """Ranks are to follow the loss, and the method knows nothing of it."""

    def __init__(self, allocation: str, strategy: str, reason: str) -> None:
        super().__init__(
            f"allocation {allocation} was asked of {strategy}, which cannot say what a singular group is worth to the "
            f"loss: {reason}. Allowed are KroneckerSVD (side both or output), FWSVD (side both or output) and TFWSVD. "
            "Set model.init_args.strategy.init_args.allocation to Uniform, or use one of them."
        )
