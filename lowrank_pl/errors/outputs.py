"""What can be wrong with the place that a run writes to."""

from __future__ import annotations

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


class RunFolderInUseError(LowRankError):
    """The folder of a run holds another run already."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"the run folder {path!r} holds the configuration of another run; nothing is ever overwritten unasked. "
            "Give another --trainer.logger.init_args.version, leave it out to get the next free number, or move the "
            "folder away."
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
