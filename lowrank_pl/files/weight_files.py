"""Which files of a Hugging Face folder hold the weights: those and no others are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lowrank_pl.errors.checkpoint import CheckpointMismatchError, NotACheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
INT8 = "model_int8.safetensors"
"""Numbers of eight bits and their scales. No other loader finds it, which would take the numbers for the weights."""


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a model's weights.

    Attributes:
        folder: Where they lie.
        shards: By file name the tensors that the index places there; `None` where one file holds all.
        argument: By which the user named the folder, for messages.
        single: Name of the file that holds all.
    """

    folder: Path
    shards: dict[str, frozenset[str]] | None = None
    argument: str = "init_from"
    single: str = SINGLE

    @property
    def names(self) -> list[str]:
        """Names of all files, the index included."""
        return [self.single] if self.shards is None else [*sorted(self.shards), INDEX]

    def check_index(self) -> None:
        """Compares the index with the names of the tensors in the shards, without reading their values.

        Raises:
            NotACheckpointError: a shard cannot be read.
            CheckpointMismatchError: a shard lacks a tensor or has one that the index does not place there; a loader
                that merges shards would take it all the same.
        """
        for name, tensors in sorted((self.shards or {}).items()):
            try:
                with safe_open(self.folder / name, framework="pt") as file:
                    found = frozenset(file.keys())
            except (SafetensorError, OSError) as error:
                raise NotACheckpointError(str(self.folder), f"{name} is damaged ({error})", self.argument) from error
            if found != tensors:
                source = str(self.folder / name)
                raise CheckpointMismatchError.keys(source, sorted(tensors - found), sorted(found - tensors))

    def read(self) -> dict[str, Tensor]:
        """Reads every tensor.

        Raises:
            NotACheckpointError: a file cannot be read.
        """
        state: dict[str, Tensor] = {}
        for name in [self.single] if self.shards is None else sorted(self.shards):
            try:
                state.update(load_file(self.folder / name))
            except (SafetensorError, OSError) as error:
                raise NotACheckpointError(str(self.folder), f"{name} is damaged ({error})", self.argument) from error
        return state


def weight_files(folder: Path, argument: str = "init_from") -> WeightFiles:
    """Finds the weights as transformers does: `model.safetensors`, or the shards that the index names.

    Whatever else lies there, a shard of an earlier save or a pickle, is not looked at.

    Args:
        folder: Where they lie.
        argument: By which the user named it, for messages.

    Raises:
        NotACheckpointError: there are no weights, a shard is missing, the index is damaged, or file and index are
            both there and name different weights.
    """
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return WeightFiles(folder, argument=argument)
        raise NotACheckpointError(str(folder), f"it has neither {SINGLE} nor {INDEX}, which names the shards", argument)
    shards = _read_index(folder, argument)
    if (folder / SINGLE).is_file() and set(shards) != {SINGLE}:
        problem = f"it has both {SINGLE} and {INDEX}, of which one is left from an earlier save; remove that one"
        raise NotACheckpointError(str(folder), problem, argument)
    if missing := [name for name in sorted(shards) if not (folder / name).is_file()]:
        problem = f"{INDEX} names {missing[0]!r}, which is missing ({len(missing)} of {len(shards)} files are)"
        raise NotACheckpointError(str(folder), f"{problem}; copy the folder again", argument)
    return WeightFiles(folder, shards, argument)


def int8_files(folder: Path, argument: str = "init_from") -> WeightFiles:
    """The file of a folder in eight bits; see `weight_files`.

    Raises:
        NotACheckpointError: it is not there.
    """
    if not (folder / INT8).is_file():
        raise NotACheckpointError(str(folder), f"its config.json tells of int8, and it has no {INT8}", argument)
    return WeightFiles(folder, argument=argument, single=INT8)


def remove_superseded(folder: Path) -> None:
    """Removes what transformers leaves of an earlier save when a model is saved over itself in other shards.

    It removes the old shards itself, so that an index whose shards are missing is the old one.
    """
    if (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        complete = all((folder / name).is_file() for name in _read_index(folder))
        (folder / (SINGLE if complete else INDEX)).unlink()


def _read_index(folder: Path, argument: str = "init_from") -> dict[str, frozenset[str]]:
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, set[str]] = {}
        for tensor, name in places.items():
            shards.setdefault(name, set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{INDEX} is damaged ({type(error).__name__}: {error})"
        raise NotACheckpointError(str(folder), problem, argument) from error
    # A name with a folder in it could lead anywhere on the disk.
    strange = [name for name in shards if not isinstance(name, str) or Path(name).name != name]
    if strange or not shards:
        problem = f"{INDEX} names {strange[0]!r}, no file beside it" if strange else f"{INDEX} names no shard"
        raise NotACheckpointError(str(folder), problem, argument)
    return {name: frozenset(tensors) for name, tensors in shards.items()}
