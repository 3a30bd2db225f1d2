"""What can be wrong with data, a tokenizer, or where the data come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from lowrank_pl.errors.base import LowRankError

_SHOWN = 12


def _listed(values: Iterable[object]) -> str:
    """Quotes values, and cuts long lists."""
    quoted = [repr(value) for value in values]
    more = f", … ({len(quoted)} in all)" if len(quoted) > _SHOWN else ""
    return ", ".join(quoted[:_SHOWN]) + more


def _did_you_mean(given: str, allowed: Iterable[str]) -> str:
    lowered = {value.lower(): value for value in allowed}
    close = get_close_matches(given.lower(), list(lowered), n=1, cutoff=0.6)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""


def _place(path: str | Path, line: int) -> str:
    return f"{path}:{line}"


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
            f"no GLUE task is called {task!r}; there are {_listed(allowed)}."
            f"{_did_you_mean(task, allowed)} Check data.init_args.task."
        )


class MissingFileError(DataError):
    """A file of the data set that is not there.

    Args:
        path: The file looked for.
        argument: The argument to check.
    """

    def __init__(self, path: str | Path, argument: str) -> None:
        path = Path(path)
        if path.is_dir():
            found = f"it is a folder that holds {_listed(sorted(p.name for p in path.iterdir()))}."
        elif path.parent.is_dir():
            names = sorted(p.name for p in path.parent.iterdir())
            found = f"its folder holds {_listed(names) or 'nothing'}.{_did_you_mean(path.name, names)}"
        else:
            found = f"nor is there a folder {str(path.parent)!r}."
        super().__init__(f"no data file at {str(path)!r}: {found} Check {argument}.")


class UnsupportedFormatError(DataError):
    """A data file whose extension says nothing about how to read it.

    Args:
        path: The file.
        allowed: Extensions that can be read.
    """

    def __init__(self, path: str | Path, allowed: Sequence[str]) -> None:
        super().__init__(
            f"cannot tell the format of {str(path)!r} from its extension {Path(path).suffix!r}; "
            f"allowed are {_listed(allowed)}. Convert or rename the file."
        )


class UnknownColumnError(DataError):
    """A column that the file does not have.

    Args:
        column: The column looked for.
        columns: The columns of the file.
        path: The file.
        argument: The argument to check.
    """

    def __init__(self, column: str, columns: Sequence[str], path: str | Path, argument: str) -> None:
        super().__init__(
            f"no column {column!r} in {str(path)!r}; it has {_listed(columns)}."
            f"{_did_you_mean(column, columns)} Check {argument}."
        )


class MissingValueError(DataError):
    """A sample without text.

    Args:
        path: The file, or the hub id.
        row: Number of the line or row, counted from 1.
        column: The empty column.
        value: What stands there: nothing, or white space.
    """

    def __init__(self, path: str | Path, row: int, column: str, value: object = None) -> None:
        found = f"nothing but white space, {value!r}," if isinstance(value, str) and value else "no value"
        super().__init__(
            f"{_place(path, row)} has {found} in column {column!r}; every sample needs a text. "
            "Fill it in or remove the row, or leave such rows out with data.init_args.empty_texts=skip."
        )


class NotATextError(DataError):
    """A value in a column of texts that nobody would read as one.

    Args:
        path: The file.
        row: Number of the line or row, counted from 1.
        column: The column.
        value: What stands there.
    """

    def __init__(self, path: str | Path, row: int, column: str, value: object) -> None:
        kind = type(value).__name__
        article = "an" if kind[0].lower() in "aeiou" else "a"
        super().__init__(
            f"{_place(path, row)} has {article} {kind} in column {column!r}; allowed are strings and numbers. "
            "Check the file, and that the column is the right one."
        )


class MissingSplitError(DataError):
    """A split that a run needs and that the data do not have.

    Args:
        split: The split.
        given: The splits there are.
        remedy: What to do.
    """

    def __init__(self, split: str, given: Sequence[str], remedy: str) -> None:
        super().__init__(f"the data have no {split} split; they have {_listed(given) or 'none'}. {remedy}")


class UnknownTargetError(DataError):
    """Texts alone, for which it is not known what is to be predicted.

    Args:
        data: The class of the data.
    """

    def __init__(self, data: str) -> None:
        super().__init__(
            f"these {data} have no labels, and no model has told what it predicts. Run them through a trainer with a "
            "model that does: a checkpoint (ckpt_path, init_from), or one that is loaded or trained already."
        )


class UnknownClassesError(DataError):
    """Labelled data whose classes are not known.

    Args:
        split: The split that is labelled.
        path: Its file.
    """

    def __init__(self, split: str, path: str | Path) -> None:
        super().__init__(
            f"the {split} split in {str(path)!r} is labelled, and without a training split nothing tells the classes "
            "and their order. Give the checkpoint that is to be scored (--ckpt_path or model.init_args.init_from), "
            "data.init_args.label_names, or data.init_args.train."
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


class MissingLabelsError(DataError):
    """A split that must be labelled and is not.

    Args:
        split: The split.
        path: Where it came from.
        column: The column that holds no labels.
    """

    def __init__(self, split: str, path: str | Path, column: str) -> None:
        super().__init__(
            f"the {split} split in {str(path)!r} has no labels in column {column!r}; "
            "only the test split may lack them. Check the file and data.init_args.label."
        )


class UnknownLabelError(DataError):
    """A label that is not one of the classes, or is outside the range of the score.

    Args:
        path: The file.
        row: Number of the line or row, counted from 1.
        value: The label found.
        allowed: Class names, or the range in words.
    """

    def __init__(self, path: str | Path, row: int, value: object, allowed: Sequence[str] | str) -> None:
        told = allowed if isinstance(allowed, str) else _listed(allowed)
        super().__init__(
            f"{_place(path, row)} is labelled {value!r}; allowed are {told}. "
            "Correct the row, or check that the label column is the right one and that no class is left out."
        )


class NotANumberError(DataError):
    """A regression target that is not a finite number.

    Args:
        path: The file.
        row: Number of the line or row, counted from 1.
        value: The target found.
    """

    def __init__(self, path: str | Path, row: int, value: object) -> None:
        super().__init__(
            f"{_place(path, row)} has the regression target {value!r}; allowed are finite numbers. "
            "Correct the row, or use kind='classification' if the labels are class names."
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


class SingleClassError(DataError):
    """A training split in which every sample has the same label.

    Args:
        path: Where the split came from.
        label: The only label.
        rows: Number of samples.
    """

    def __init__(self, path: str | Path, label: object, rows: int) -> None:
        super().__init__(
            f"all {rows} training samples of {str(path)!r} are labelled {label!r}; at least two classes are needed "
            "to learn and to calibrate. Check that the label column is the right one and the file is not cut off."
        )


class EncodingError(DataError):
    """A text file that is not UTF-8.

    Args:
        path: The file.
        offset: Position of the first offending byte.
        byte: Its value.
    """

    def __init__(self, path: str | Path, offset: int, byte: int) -> None:
        super().__init__(
            f"{str(path)!r} is not UTF-8: byte 0x{byte:02x} at offset {offset}; expected UTF-8, with or without a "
            "byte-order mark. Convert it, e.g. `iconv -f latin1 -t utf-8`."
        )


class MalformedLineError(DataError):
    """A line with too few or too many columns, or one that is no JSON object.

    Args:
        path: The file.
        line: Number of the line, counted from 1.
        found: What the line holds, in words.
        expected: What it should hold, in words.
        remedy: What to do.
    """

    def __init__(
        self, path: str | Path, line: int, found: str, expected: str, remedy: str = "Correct or remove the line."
    ) -> None:
        super().__init__(f"{_place(path, line)} has {found}; expected {expected}. {remedy}")


class MalformedFileError(DataError):
    """A file that its reader rejects.

    Args:
        path: The file.
        cause: What the reader said.
    """

    def __init__(self, path: str | Path, cause: object) -> None:
        super().__init__(
            f"cannot read {str(path)!r} as {Path(path).suffix.lstrip('.').upper()}: {cause}. "
            "Check that the extension tells the truth and that every row has the columns of the header."
        )


class BadTagError(DataError):
    """A tag that is not of the BIO scheme.

    Args:
        path: The file.
        line: Number of the line, counted from 1.
        tag: The tag found.
    """

    def __init__(self, path: str | Path, line: int, tag: str) -> None:
        super().__init__(
            f"{_place(path, line)} has the tag {tag!r}; allowed are 'O', 'B-<type>' and 'I-<type>'. "
            "Check data.init_args.tag_column, or convert the file to BIO."
        )


class OfflineError(DataError):
    """A data set of the hub that cannot be reached.

    Args:
        dataset: Its id.
        cause: What the hub client said.
        remedy: How to get the data otherwise.
    """

    def __init__(self, dataset: str, cause: object, remedy: str) -> None:
        super().__init__(
            f"cannot load {dataset!r} from the Hugging Face hub ({cause}). {remedy} "
            "If HF_HUB_OFFLINE is set and this machine has a network, unset it."
        )


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
            f"docstrings of {len(found)} package(s) found ({_listed(found) or 'none'}) of the asked "
            f"{_listed(asked)}; at least two are needed, because the package is the class. "
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
            f"(e.g. 'sklearn', not 'scikit-learn').{_did_you_mean(package, installed)} "
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
