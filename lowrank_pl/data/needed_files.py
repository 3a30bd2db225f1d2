"""Which files of its splits a run reads, and which it can do without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from lowrank_pl.data.files import find_file
from lowrank_pl.errors.data_files import MissingFileError

Files = Mapping[str, str | Path | None]
"""By split; `None` where none was given."""

# Which splits a verb that does not train reads: the first that there is.
_READ: dict[Any, tuple[str, ...]] = {
    TrainerFn.VALIDATING: ("validation", "train"),
    TrainerFn.TESTING: ("test", "validation", "train"),
    TrainerFn.PREDICTING: ("test", "validation", "train"),
}


def can_do_without(split: str, verb: TrainerFn | None, files: Files) -> bool:
    """Whether a verb need not read a split; not where nobody knows which verb it is."""
    first = next((name for name in _READ.get(verb, ()) if files.get(name) is not None), split)
    return split != first


def find_needed(
    files: Files, verb: TrainerFn | None, argument: str
) -> tuple[dict[str, Path], dict[str, MissingFileError]]:
    """The files that are there, and what to tell whoever asks for one that is not and that the verb can do without.

    Args:
        files: Of all splits.
        verb: What they are read for; `None` where nobody knows.
        argument: What names a file, for the error, with `{split}` in it where splits have arguments of their own.

    Raises:
        MissingFileError: a file that the verb reads is not there.
    """
    found: dict[str, Path] = {}
    left_out: dict[str, MissingFileError] = {}
    for split, path in files.items():
        if path is not None:
            try:
                found[split] = find_file(path, argument.format(split=split))
            except MissingFileError as error:
                if not can_do_without(split, verb, files):
                    raise
                left_out[split] = error
    return found, left_out
