"""Reads text files line by line, and says which line is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from lowrank_pl.errors.data import EmptyDataError
from lowrank_pl.errors.data_files import (
    DuplicateColumnError,
    EncodingError,
    MalformedLineError,
    MissingFileError,
    UnknownColumnError,
)

BadLines = Literal["error", "skip"]

_BOM = b"\xef\xbb\xbf"


def find_file(path: str | Path, argument: str) -> Path:
    """Returns an existing file.

    Args:
        path: The file; `~` is the home folder.
        argument: The argument it came from, for the error.

    Raises:
        MissingFileError: there is no such file, or it is a folder.
    """
    found = Path(path).expanduser()
    if not found.is_file():
        raise MissingFileError(found, argument)
    return found


def read_utf8(path: Path) -> bytes:
    """Returns the content of a UTF-8 file without a byte-order mark.

    Raises:
        EncodingError: it is not UTF-8.
    """
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EncodingError(path, error.start, content[error.start]) from None
    return content.removeprefix(_BOM)


def read_lines(path: Path) -> list[str]:
    r"""Returns the lines of a UTF-8 file.

    Only `\n` and `\r\n` end a line: sentences may hold any other separator Unicode knows.

    Raises:
        EncodingError: the file is not UTF-8.
    """
    lines = [line.removesuffix("\r") for line in read_utf8(path).decode("utf-8").split("\n")]
    if lines and not lines[-1]:
        lines.pop()
    return lines


def find_columns(path: Path, header: Sequence[str], wanted: Mapping[str, str], optional: Sequence[str]) -> list[str]:
    """Returns the columns to read, in the order in which they are asked for.

    Args:
        path: The file, for errors.
        header: All columns of the file.
        wanted: Columns that must exist, each with the argument that names it.
        optional: Columns that are read if they exist.

    Raises:
        UnknownColumnError: a wanted column is missing.
        DuplicateColumnError: a column to be read exists several times.
    """
    for column, argument in wanted.items():
        if column not in header:
            raise UnknownColumnError(column, header, path, argument)
    found = [column for column in dict.fromkeys([*wanted, *optional]) if column in header]
    for column in found:
        if header.count(column) > 1:
            raise DuplicateColumnError(column, header, path, wanted.get(column, "data.init_args.label"))
    return found


class Table:
    """Some columns of a tab-separated file, with the line each row came from.

    Attributes:
        columns: Values by column.
        lines: Line numbers of the rows, counted from 1.
        skipped: Lines left out because they were malformed.
    """

    def __init__(self, columns: dict[str, list[str]], lines: list[int], skipped: list[int]) -> None:
        self.columns = columns
        self.lines = lines
        self.skipped = skipped


def read_tsv(
    path: Path,
    wanted: Mapping[str, str],
    optional: Sequence[str] = (),
    header: Sequence[str] | None = None,
    bad_lines: BadLines | None = None,
) -> Table:
    """Reads a tab-separated file without quoting, in which a quotation mark is a character like any other.

    Args:
        path: The file.
        wanted: Columns that must exist, each with the argument that names it.
        optional: Columns that are read if they exist.
        header: Names of the columns if the file has no header line.
        bad_lines: What to do with a line that has not as many columns as the header; `None` stops at it, and the
            error does not offer the choice.

    Raises:
        EncodingError: the file is not UTF-8.
        UnknownColumnError, DuplicateColumnError: see `find_columns`.
        MalformedLineError: a line has too few or too many columns.
        EmptyDataError: there is no line besides the header.
    """
    lines = read_lines(path)
    first = 1
    if header is None:
        if not any(line.strip() for line in lines):
            raise EmptyDataError(path)
        header, lines, first = lines[0].split("\t"), lines[1:], 2
    places = {column: header.index(column) for column in find_columns(path, header, wanted, optional)}
    values: dict[str, list[str]] = {column: [] for column in places}
    numbers, skipped = [], []
    for number, line in enumerate(lines, first):
        fields = line.split("\t")
        if len(fields) != len(header):
            if bad_lines != "skip":
                skip = ", or leave such lines out with data.init_args.bad_lines=skip" if bad_lines else ""
                raise MalformedLineError(
                    path,
                    number,
                    f"{len(fields)} column(s)",
                    f"{len(header)}: {', '.join(header)}",
                    f"Correct the line{skip}.",
                )
            skipped.append(number)
            continue
        numbers.append(number)
        for column, place in places.items():
            values[column].append(fields[place])
    if not numbers:
        raise EmptyDataError(path)
    return Table(values, numbers, skipped)
