"""What several processes, or a way of dividing a model among them, do not allow."""

from __future__ import annotations

from lowrank_pl.errors.base import LowRankError


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
