"""What can be wrong with the files that samples are read from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank_pl.errors.data import DataError
from lowrank_pl.errors.wording import did_you_mean, listed, place


class MissingFileError(DataError):
    """A file of the data set that is not there.

    Args:
        path: The file looked for.
        argument: The argument to check.
    """

    def __init__(self, path: str | Path, argument: str) -> None:
        path = Path(path)
        if path.is_dir():
            found = f"it is a folder that holds {listed(sorted(p.name for p in path.iterdir()))}."
        elif path.parent.is_dir():
            names = sorted(p.name for p in path.parent.iterdir())
            found = f"its folder holds {listed(names) or 'nothing'}.{did_you_mean(path.name, names)}"
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
            f"allowed are {listed(allowed)}. Convert or rename the file."
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
            f"no column {column!r} in {str(path)!r}; it has {listed(columns)}."
            f"{did_you_mean(column, columns)} Check {argument}."
        )


class DuplicateColumnError(DataError):
    """A column that is asked for and that the file has several times.

    Args:
        column: The column looked for.
        columns: The columns of the file.
        path: The file.
        argument: The argument that names it.
    """

    def __init__(self, column: str, columns: Sequence[str], path: str | Path, argument: str) -> None:
        super().__init__(
            f"{columns.count(column)} columns of {str(path)!r} are called {column!r}, and only one can be meant; it "
            f"has {listed(columns)}. Rename all but one, or check {argument}."
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
            f"{place(path, row)} has {found} in column {column!r}; every sample needs a text. "
            "Fill it in or remove the row, or leave such rows out with data.init_args.empty_texts=skip."
        )


class NotATextError(DataError):
    """A value in a column of texts, or of labels, that nobody would read as one.

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
            f"{place(path, row)} has {article} {kind} in column {column!r}; allowed are strings and numbers. "
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
        super().__init__(f"the data have no {split} split; they have {listed(given) or 'none'}. {remedy}")


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
        super().__init__(f"{place(path, line)} has {found}; expected {expected}. {remedy}")


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
