"""A folder of prepared data per content: the same input finds it again, another input never does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

CACHE_VARIABLE = "LOWRANK_PL_CACHE"


def cache_root(folder: str | None) -> Path:
    """Returns the folder of all prepared data.

    Args:
        folder: What the user asked for; else `$LOWRANK_PL_CACHE/data`, else `~/.cache/lowrank_pl/data`.
    """
    if folder is not None:
        return Path(folder).expanduser()
    home = os.environ.get(CACHE_VARIABLE)
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "lowrank_pl") / "data"


def digest(*parts: Any) -> str:
    """Returns 20 hexadecimal digits that identify JSON-ready values."""
    told = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(told.encode()).hexdigest()[:20]


def file_digest(path: Path) -> str:
    """Identifies the content of a file."""
    with path.open("rb") as file:
        hasher = hashlib.sha256()
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()[:20]


def dataset_digest(dataset: Dataset) -> str:
    """Identifies the rows of a data set, whatever their chunks in memory or on disk."""
    table = dataset.with_format("arrow")[:]
    hasher = hashlib.sha256()
    table = table.replace_schema_metadata(None).combine_chunks()
    with pa.PythonFile(_Sink(hasher), mode="w") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return hasher.hexdigest()[:20]


class _Sink:
    """A write-only file that keeps nothing but the hash of what is written."""

    closed = False

    def __init__(self, hasher: Any) -> None:
        self._hasher = hasher

    def write(self, data: Any) -> int:
        self._hasher.update(data)
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies what a tokenizer does to a text, not the calls it has already served.

    A fast tokenizer keeps the truncation and padding of its last call in its serialised state.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        pieces: Any = tokenizer.get_vocab()
    else:
        pieces = json.loads(backend.to_str())
        pieces.update(truncation=None, padding=None)
    sides = (tokenizer.padding_side, tokenizer.truncation_side)
    return digest(type(tokenizer).__name__, pieces, tokenizer.model_input_names, tokenizer.special_tokens_map, sides)


def tree_digest(files: Iterable[Path]) -> str:
    """Identifies source files by path, size and time of change, without reading them."""
    stats = []
    for file in files:
        stat = file.stat()
        stats.append((str(file), stat.st_size, stat.st_mtime_ns))
    return digest(sorted(stats))


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `folder` if the block succeeds.

    Several processes may prepare the same folder at once: the first to finish wins, and nobody ever sees a
    folder half written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Removes a folder that has lost a part; of several processes the first does."""
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    with suppress(FileNotFoundError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
