"""Exports that kill themselves half way: `killed.py CHECKPOINT FOLDER` makes `FOLDER/POINT/fresh` and `…/over`.

Each export runs in a fork of this process, which has done one itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import PreTrainedTokenizerBase, modeling_utils

from lowrank_pl.checkpoint import factorised
from lowrank_pl.export import export, folder
from lowrank_pl.files import atomic


def kill(*args: Any, **kwargs: Any) -> None:
    """Ends this process as the kernel would, when the memory is used up."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str) -> None:
    """Kills instead of calling a function."""
    setattr(owner, name, kill)


def after(owner: Any, name: str, times: int = 1, then: Callable[..., None] = kill) -> None:
    """Kills when a function has been called so many times."""
    function, calls = getattr(owner, name), [0]

    def called(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        calls[0] += 1
        if calls[0] == times:
            then()
        return result

    setattr(owner, name, called)


def while_removing() -> None:
    """Kills when a part of the old folder is gone."""

    real = shutil.rmtree

    def rmtree(path: Path, **kwargs: Any) -> None:
        old = next(iter(Path(path).rglob("*.txt")), None)
        if old is None:  # the folder that only tries whether one can be made
            return real(path, **kwargs)
        old.unlink()
        kill()

    shutil.rmtree = rmtree  # type: ignore[assignment]


def by_renaming(renames: int) -> None:
    """Kills after so many renames, where the system cannot exchange folders in one step."""
    atomic._exchange_at_once = lambda new, old: False
    after(Path, "rename", renames)


def limit(size: int) -> None:
    """No file may become larger: writing more fails as on a full disk."""
    import resource  # where there is none, this file is only imported

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


ALWAYS: dict[str, Callable[[], None]] = {
    "first-shard": lambda: after(modeling_utils, "safe_save_file"),
    "weights": lambda: before(factorised, "write_checksums"),
    "checksums": lambda: after(factorised, "write_checksums"),
    "tokenizer": lambda: after(PreTrainedTokenizerBase, "save_pretrained"),
    "card": lambda: after(folder, "model_card"),
}
FRESH: dict[str, Callable[[], None]] = {
    "before-the-rename": lambda: before(Path, "rename"),
    "after-the-rename": lambda: after(Path, "rename"),
}
OVER: dict[str, Callable[[], None]] = {
    "before-the-exchange": lambda: before(atomic, "_exchange"),
    "after-the-exchange": lambda: after(atomic, "_exchange"),
    "while-removing": while_removing,
    "one-rename": lambda: by_renaming(1),
    "two-renames": lambda: by_renaming(2),
    "three-renames": lambda: by_renaming(3),
}
FULL: dict[str, Callable[[], None]] = {
    "full-for-weights": lambda: limit(8000),
    "full-for-tokenizer": lambda: after(factorised, "write_checksums", then=lambda: limit(500)),
}


def run(checkpoint: str, output: Path, arm: Callable[[], None], over: bool) -> int:
    """Exports in a fork; returns its exit code, negative for a signal, 3 for an error, told in a file beside."""
    output.parent.mkdir(parents=True)
    if over:
        (output / "sub").mkdir(parents=True)
        (output / "file.txt").write_text("old")
        (output / "sub" / "mine.txt").write_text("mine")
    child = os.fork()
    if child == 0:
        told = (output.parent / "told").open("w")
        try:
            arm()
            export(checkpoint, str(output), overwrite=over, max_shard_size="20KB")
        except Exception as error:
            print(type(error).__name__, error, file=told, flush=True)
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(checkpoint: str, where: Path) -> None:
    """Runs every export."""
    torch.set_num_threads(1)  # a fork has no other threads
    export(checkpoint, str(where / "once"))
    for name, arm in {**ALWAYS, **FRESH, **OVER, **FULL}.items():
        for kind in ("fresh", "over"):
            if name in (OVER if kind == "fresh" else FRESH):
                continue
            code = run(checkpoint, where / name / kind / "out", arm, kind == "over")
            expected = 3 if name in FULL else -signal.SIGKILL
            if code != expected:
                sys.exit(f"{name}, {kind}: exit code {code}, not {expected}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
