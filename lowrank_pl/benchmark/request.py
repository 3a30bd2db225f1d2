"""What a user asks of a benchmark, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import torch

from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.files import OutputFolder


def check_request(
    folder: OutputFolder,
    models: Sequence[str],
    engines: Sequence[str],
    device: str,
    whole: Mapping[str, Sequence[int]],
    resume: bool,
) -> None:
    """Raises an error for what cannot be measured.

    Args:
        folder: Where results will go.
        models: As named by the user.
        engines: Likewise.
        device: Likewise.
        whole: Numbers by argument; all from 1, none twice.
        resume: Whether the folder is that of a stopped run.

    Raises:
        OutputExistsError, OutputNotWritableError: the folder has content, or cannot be made.
        RangeError: a number below 1, or one given twice.
        MissingArgumentError: nothing to measure, or a device that is not there.
    """
    if not resume:
        folder.check()
    check_names({"models": models, "engines": engines})
    for name, values in whole.items():
        if not values:
            raise MissingArgumentError(f"a number for {name}", f"Give at least one with --{name}.")
        for value in values:
            if value < 1 or list(values).count(value) > 1:
                raise RangeError(name, value, "whole numbers from 1, each once")
    check_device(device)


def check_names(lists: Mapping[str, Sequence[str]]) -> None:
    """Raises an error for a list, by its argument, that is empty or has an entry twice.

    Raises:
        MissingArgumentError: it does.
    """
    for name, given in lists.items():
        words = [str(Path(word).expanduser()) for word in given]
        if not words:
            raise MissingArgumentError(f"an entry of {name}", f"Name at least one with --{name}.")
        if len(set(words)) < len(words):
            raise MissingArgumentError(
                f"a different entry of {name}", f"One is named twice in --{name}; name each once."
            )


def check_device(device: str) -> None:
    """Raises an error for a device that torch cannot use.

    Raises:
        MissingArgumentError: it cannot.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise MissingArgumentError(f"the device {device!r}", f"torch says: {problem}. Try --device cpu.") from error


def labels(paths: Sequence[str]) -> dict[str, str]:
    """Paths by short names: what is left of them without what they have in common at both ends."""
    parts = [Path(path).parts for path in paths]
    if len(parts) == 1:
        return {Path(paths[0]).name or paths[0]: paths[0]}
    start = next((i for i, row in enumerate(zip_longest(*parts)) if len(set(row)) > 1), 0)
    ends = [row[start:][::-1] for row in parts]
    same = next((i for i, row in enumerate(zip_longest(*ends)) if len(set(row)) > 1), 0)
    short = ["/".join(row[start : len(row) - same]) or path for row, path in zip(parts, paths, strict=True)]
    return dict(zip(short if len(set(short)) == len(paths) else paths, paths, strict=True))
