"""Writing a folder all or nothing: at any moment it is the old one or the new one, never half of one."""

from __future__ import annotations

import ctypes
import glob
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lowrank_pl.errors.outputs import OutputExistsError, OutputNotWritableError
from lowrank_pl.files.durable import flush, flush_names
from lowrank_pl.files.modes import follow_umask

logger = logging.getLogger(__name__)

_PART = ".part"
_ASIDE = ".aside"

TO_REPLACE = "Give another --output, or --overwrite true to replace the folder."
_A_FILE = "It is a file, in whose place no folder is put; give another --output."


def check_output(output: Path, overwrite: bool, remedy: str | None = TO_REPLACE) -> None:
    """Raises an error for a folder that must not be replaced or cannot be made, and repairs what killed runs have left.

    A folder that a killed run has left aside is put back. Unfinished ones are reported, not removed: their run may be
    going on.

    Args:
        output: The folder that is to be made.
        overwrite: Whether a folder that exists and is not empty may be replaced.
        remedy: What to do where it may not, for the message; `None` to move it away.

    Raises:
        OutputExistsError: something is there and may not be replaced.
        OutputNotWritableError: nothing can be made there.
    """
    with errors_told(output):
        folder = _real(output)
        if not folder.exists() and (aside := _beside(folder, _ASIDE)):
            aside[-1].rename(folder)
            logger.warning("a run was killed while it replaced %s: what was there is put back", output)
        for rest in [*_beside(folder, _PART), *_beside(folder, _ASIDE)]:
            logger.warning("%s is left of a killed run: remove it, unless another to %s is running", rest, output)
        _refuse(folder, output, overwrite, remedy)
        with _part_of(folder):
            pass


@contextmanager
def all_or_nothing(output: Path, overwrite: bool, remedy: str | None = TO_REPLACE) -> Iterator[Path]:
    """Gives a new folder that takes the place of the output folder when the `with` block has succeeded.

    Until then it has a hidden name beside its place, `.NAME.….part`. Its files get the modes that the umask asks for.
    An error removes it; a kill leaves it there. A folder that is replaced changes places with the new one in one step
    where the system can (Linux, on most file systems). Elsewhere a kill in the middle can leave it as `.NAME.….aside`,
    from where `check_output` puts it back.

    Args:
        output: The folder to make; where it is a link, what it points to.
        overwrite: Replace a folder that exists and is not empty.
        remedy: See `check_output`.

    Raises:
        OutputExistsError: something is there and may not be replaced.
        OutputNotWritableError: a file or folder cannot be written.
    """
    folder = _real(output)
    with errors_told(output), _part_of(folder) as part:
        yield part
        follow_umask(*(path for path in part.rglob("*") if path.is_file()))
        flush(part)
        _refuse(folder, output, overwrite, remedy)
        if folder.exists():
            _exchange(part, folder)
        else:
            part.rename(folder)
        flush_names(folder.parent)


@contextmanager
def _part_of(folder: Path) -> Iterator[Path]:
    """Makes a hidden folder beside another, and the parents that it lacks; leaves none of them behind."""
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{_PART}")
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        part.mkdir(parents=True)
        yield part
    finally:
        try:
            part.rmdir()  # nothing has been written
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not empty: the folder is there
                parent.rmdir()


def _real(output: Path) -> Path:
    """Where a path leads to: a link is kept, and its target replaced."""
    return Path(os.path.realpath(output))


def _beside(folder: Path, ending: str) -> list[Path]:
    return sorted(folder.parent.glob(f".{glob.escape(folder.name)}.????????{ending}"))


def _refuse(folder: Path, output: Path, overwrite: bool, remedy: str | None) -> None:
    if folder.is_dir() and (overwrite or not any(folder.iterdir())):
        return
    if folder.exists():
        raise OutputExistsError(str(output), remedy if folder.is_dir() else _A_FILE)


@contextmanager
def errors_told(output: Path) -> Iterator[None]:
    """Turns what writing can raise into this package's error.

    Raises:
        OutputNotWritableError: the disk is full, for instance.
    """
    try:
        yield
    except Exception as error:
        # safetensors has its own class for a full disk, tokenizers raises Exception itself.
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            raise OutputNotWritableError(str(output), str(error)) from error
        raise


def _exchange(new: Path, old: Path) -> None:
    """Lets two folders change places."""
    if _exchange_at_once(new, old):
        return
    aside = new.with_suffix(_ASIDE)
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


def _exchange_at_once(new: Path, old: Path) -> bool:
    """The same in one step, which no kill can divide; `False` where system or file system know none."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    anywhere, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fs.h; both paths are absolute
    return bool(rename(anywhere, os.fsencode(new), anywhere, os.fsencode(old), exchange) == 0)
