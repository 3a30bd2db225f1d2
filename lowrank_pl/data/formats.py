"""Reads columns of CSV, TSV, JSON Lines, Parquet and text files, and says which line is wrong."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from lowrank_pl.data.files import find_columns, read_lines, read_tsv, read_utf8
from lowrank_pl.errors.data import EmptyDataError
from lowrank_pl.errors.data_files import (
    MalformedFileError,
    MalformedLineError,
    UnsupportedFormatError,
)

_LONGEST_FIELD = 1 << 30


@dataclass
class Columns:
    """Some columns of a file.

    Attributes:
        values: Values by column; `None` where the file has none.
        rows: Line numbers (Parquet: row numbers), counted from 1.
    """

    values: dict[str, list[Any]]
    rows: Sequence[int]


def read_columns(path: Path, wanted: dict[str, str], optional: Sequence[str] = ()) -> Columns:
    """Reads columns of a file whose extension gives its format.

    Args:
        path: A `.csv` (quoted), `.tsv` (not quoted), `.jsonl` or `.parquet` file, or a `.txt` file, whose lines are the
            first wanted column, whatever its name.
        wanted: Columns that must exist, each with the argument that names it.
        optional: Columns that are read if they exist.

    Raises:
        UnsupportedFormatError: another extension.
        UnknownColumnError, DuplicateColumnError: a column to be read is missing, or there several times.
        EncodingError: a text file that is not UTF-8.
        MalformedLineError: a line that cannot be read.
        MalformedFileError: a Parquet file that cannot be read.
        EmptyDataError: there are no rows.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UnsupportedFormatError(path, list(_READERS))
    columns = reader(path, wanted, optional)
    if not columns.rows:
        raise EmptyDataError(path)
    return columns


def has_column(path: Path, column: str) -> bool:
    """Whether a file has a column, told by as little of it as possible; also where it cannot be read, which tells more.

    Args:
        path: An existing file; see `read_columns`.
        column: The column. In JSON Lines one object that has it is enough.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return column in pa.parquet.read_schema(path).names
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix == ".jsonl":
                return any(column in json.loads(line) for line in file if line.strip())
            if suffix == ".csv":
                return column in next((fields for fields in csv.reader(file) if fields), [])
            return suffix != ".txt" and column in file.readline().rstrip("\r\n").split("\t")
    except (pa.ArrowException, csv.Error, OSError, TypeError, ValueError):
        return True


def _present(path: Path, names: Sequence[str], wanted: dict[str, str], optional: Sequence[str]) -> list[str]:
    if not names:
        raise EmptyDataError(path)
    return find_columns(path, names, wanted, optional)


def _read_csv(path: Path, wanted: dict[str, str], optional: Sequence[str]) -> Columns:
    # The reader counts lines itself: a quoted field may span several.
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(read_utf8(path).decode("utf-8"), newline=""), strict=True)
    values: dict[str, list[Any]] = {}
    rows: list[int] = []
    try:
        header = next((fields for fields in reader if fields), [])
        names = _present(path, header, wanted, optional)
        values = {name: [] for name in names}
        places = [header.index(name) for name in names]
        line = reader.line_num + 1
        for fields in reader:
            if fields:
                if len(fields) != len(header):
                    raise MalformedLineError(
                        path, line, f"{len(fields)} column(s)", f"{len(header)}: {', '.join(header)}"
                    )
                rows.append(line)
                for name, place in zip(names, places, strict=True):
                    values[name].append(fields[place])
            line = reader.line_num + 1
    except csv.Error as error:
        raise MalformedLineError(path, reader.line_num, f"a quoting error ({error})", "CSV quoted with '\"'") from None
    return Columns(values, rows)


def _read_tsv(path: Path, wanted: dict[str, str], optional: Sequence[str]) -> Columns:
    table = read_tsv(path, wanted, optional)
    return Columns({name: list(values) for name, values in table.columns.items()}, table.lines)


def _read_txt(path: Path, wanted: dict[str, str], optional: Sequence[str]) -> Columns:
    lines = read_lines(path)
    if not any(line.strip() for line in lines):
        raise EmptyDataError(path)
    (name,) = _present(path, [next(iter(wanted))], wanted, optional)
    return Columns({name: list(lines)}, range(1, len(lines) + 1))


def _read_jsonl(path: Path, wanted: dict[str, str], optional: Sequence[str]) -> Columns:
    objects: list[dict[str, Any]] = []
    rows: list[int] = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise MalformedLineError(path, number, f"no valid JSON ({error.msg})", "one JSON object") from None
        if not isinstance(value, dict):
            raise MalformedLineError(path, number, f"a JSON {type(value).__name__}", "one JSON object")
        objects.append(value)
        rows.append(number)
    if not objects:
        raise EmptyDataError(path)
    names = _present(path, list(dict.fromkeys(key for value in objects for key in value)), wanted, optional)
    values = {name: [value.get(name) for value in objects] for name in names}
    for name in names:
        for row, value in zip(rows, values[name], strict=True):
            if isinstance(value, str) and not _is_unicode(value):
                found = f"half a character in column {name!r}: {value!r}"
                raise MalformedLineError(path, row, found, r"both escapes of a surrogate pair, such as \ud83d\ude00")
    return Columns(values, rows)


def _is_unicode(text: str) -> bool:
    """Whether a text can be written at all: JSON may name the halves of a surrogate pair one by one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path, wanted: dict[str, str], optional: Sequence[str]) -> Columns:
    try:
        names = _present(path, pa.parquet.read_schema(path).names, wanted, optional)
        table = pa.parquet.read_table(path, columns=names)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's; that of a damaged page has no number
        raise MalformedFileError(path, error) from None
    return Columns({name: table[name].to_pylist() for name in names}, range(1, table.num_rows + 1))


_Reader = Callable[[Path, dict[str, str], Sequence[str]], Columns]
_READERS: dict[str, _Reader] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
