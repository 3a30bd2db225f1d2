"""What has been written survives a loss of power."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def flush(folder: Path) -> None:
    """Waits until every file below a folder, and the folders' lists of them, have reached the disk.

    A rename can reach it before the content of what is renamed: after a loss of power the new name would lead to empty
    files, and what it has replaced would be gone.

    Raises:
        OSError: the disk could not take a file's content.
    """
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            with (Path(path) / name).open("rb+") as file:
                os.fsync(file.fileno())
        flush_names(Path(path))


def flush_names(folder: Path) -> None:
    """Waits until a folder's list of names has reached the disk, where the system lets a folder be flushed."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
