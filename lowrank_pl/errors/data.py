"""What can be wrong with data, a tokenizer, or where the data come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank_pl.errors.base import LowRankError
from lowrank_pl.errors.wording import did_you_mean, listed


class DataError(LowRankError):
    """Ancestor of every error about data."""


class UnknownTaskError(DataError):
    """A GLUE task that does not exist.

    Args:
        task: What was given.
        allowed: The official names.
    """

    def __init__(self, task: str, allowed: Sequence[str]) -> None:
        super().__init__(
            f"no GLUE task is called {task!r}; there are {listed(allowed)}."
            f"{did_you_mean(task, allowed)} Check data.init_args.task."
        )


class ResumedDataError(DataError):
    """A run that was stopped in the middle of an epoch is resumed with data in another order.

    Args:
        differences: Each setting that differs: its name, its value in the checkpoint, and now.
    """

    def __init__(self, differences: Sequence[tuple[str, object, object]]) -> None:
        told = ", ".join(f"{name} was {before!r} and is {now!r}" for name, before, now in differences)
        super().__init__(
            f"the checkpoint was written in the middle of an epoch by a run with other data settings: {told}. Which "
            "samples are still to be seen cannot be told. Resume with the run's own settings (its config.yaml), or "
            "start a new run from the weights with --model.init_args.init_from."
        )


class EmptyDataError(DataError):
    """A file or split without samples.

    Args:
        what: The file, or the split in words.
    """

    def __init__(self, what: str | Path) -> None:
        header = " and its header line" if Path(what).suffix.lower() in (".csv", ".tsv") else ""
        super().__init__(f"no samples in {str(what)!r}; at least one is needed. Check the file{header}.")


class TooFewSamplesError(DataError):
    """Fewer samples than there must be.

    Args:
        what: The file, or the split in words.
        found: Samples there are.
        least: Samples needed.
        why: What they are needed for.
        remedy: What to do.
    """

    def __init__(self, what: str | Path, found: int, least: int, why: str, remedy: str) -> None:
        super().__init__(f"{found} sample(s) in {str(what)!r}; at least {least} are needed {why}. {remedy}")


class OfflineError(DataError):
    """A data set that the hub's client cannot load: one of the hub, or a folder of this machine.

    Args:
        dataset: Its id, or the folder.
        cause: What the client said.
        remedy: How to get the data otherwise.
    """

    def __init__(self, dataset: str, cause: object, remedy: str) -> None:
        here = Path(dataset).exists()
        place = "" if here else " from the Hugging Face hub"
        network = "" if here else " If HF_HUB_OFFLINE is set and this machine has a network, unset it."
        super().__init__(f"cannot load {dataset!r}{place} ({cause}). {remedy}{network}")


class MissingTokenError(DataError):
    """A tokenizer without a special token that batches need.

    Args:
        tokenizer: Its name.
        token: `"pad"`, `"mask"`, `"eos"` or `"bos"`.
    """

    def __init__(self, tokenizer: str, token: str) -> None:
        why = {
            "pad": "to put sentences of different length in one batch",
            "mask": "for masked language modelling",
            "eos": "between the documents of a corpus",
            "bos": "at the start of every window",
        }
        instead = {
            "eos": ", or give the text to put there as data.init_args.separator, e.g. '\\n\\n'",
            "bos": ", or leave data.init_args.bos out",
        }
        super().__init__(
            f"the tokenizer {tokenizer!r} has no {token} token, which is needed {why[token]}. "
            f"Set {token}_token in its tokenizer_config.json"
            f"{instead.get(token, ', or choose an encoder that has one')}."
        )


class WindowError(DataError):
    """A corpus that does not fill one window.

    Args:
        split: Of the corpus.
        tokens: How many it has.
        window: How many a window has.
    """

    def __init__(self, split: str, tokens: int, window: int) -> None:
        super().__init__(
            f"the {split} split has {tokens:,} tokens, which do not fill one window of {window:,}; at least that many "
            f"are needed. Give more text, or lower data.init_args.window."
        )


class MaxLengthError(DataError):
    """A `max_length` that is too short to be useful or too long for the model.

    Args:
        max_length: What was given.
        least: Smallest value allowed.
        limit: Largest value the tokenizer and the model allow, or `None` for none.
        argument: The argument that set it.
        multiple: To which samples are padded, where that makes them too long.
    """

    def __init__(
        self, max_length: int, least: int, limit: int | None, argument: str = "max_length", multiple: int | None = None
    ) -> None:
        if multiple is not None:
            padded = -(-max_length // multiple) * multiple
            room = f"{least} to {limit}" if limit is not None and limit >= least else "no length"
            super().__init__(
                f"{argument}={max_length} is padded to {padded} tokens, and the model takes fewer; with "
                f"pad_to_multiple_of={multiple} allowed is {room}. Lower data.init_args.{argument} or "
                "data.init_args.pad_to_multiple_of."
            )
            return
        if limit is not None and max_length > limit:
            what = "is longer than the longest input of this model"
        else:
            what = "leaves no room for a text"
        allowed = f"{least} or more" if limit is None else f"{least} to {limit}"
        super().__init__(f"{argument}={max_length} {what}; allowed is {allowed}. Check data.init_args.{argument}.")


class ArgumentRangeError(DataError):
    """A value outside its range.

    Args:
        argument: Name of the argument.
        value: What was given.
        allowed: The range in words.
        check: Where the caller sets it; by default the datamodule's argument of that name.
    """

    def __init__(self, argument: str, value: object, allowed: str, check: str | None = None) -> None:
        where = check or f"data.init_args.{argument}"
        super().__init__(f"{argument}={value!r}; allowed is {allowed}. Check {where}.")


class TooFewPackagesError(DataError):
    """Not enough installed packages to tell apart.

    Args:
        found: Packages that have documented functions.
        asked: Packages looked for.
    """

    def __init__(self, found: Sequence[str], asked: Sequence[str]) -> None:
        super().__init__(
            f"docstrings of {len(found)} package(s) found ({listed(found) or 'none'}) of the asked "
            f"{listed(asked)}; at least two are needed, because the package is the class. "
            "Name installed packages in data.init_args.packages."
        )


class UnknownPackageError(DataError):
    """A package that is not installed, or has no Python sources.

    Args:
        package: What was given.
        installed: Import names of what is installed.
    """

    def __init__(self, package: str, installed: Sequence[str]) -> None:
        super().__init__(
            f"no sources of a package {package!r} on this machine; allowed are import names of installed packages "
            f"(e.g. 'sklearn', not 'scikit-learn').{did_you_mean(package, installed)} "
            "Install it or check data.init_args.packages."
        )


class DataNotReadyError(DataError):
    """Something was asked of a datamodule before its `setup`.

    Args:
        asked: What was asked.
    """

    def __init__(self, asked: str) -> None:
        super().__init__(
            f"{asked} is known once the data are read; this datamodule has not been set up. "
            "Call prepare_data() and setup() first (the Trainer does)."
        )
