"""Who may read a file: what the user's umask says, whichever library wrote it."""

from __future__ import annotations

import stat
import uuid
from pathlib import Path


def follow_umask(*files: Path) -> None:
    """Gives files the mode that a file opened in the plain way has there.

    safetensors and Python's tempfile write files that their owner alone can read.

    Args:
        files: Existing files, all in folders that can be written.
    """
    modes: dict[Path, int] = {}
    for file in files:
        if file.parent not in modes:
            modes[file.parent] = _mode_of_a_new_file(file.parent)
        file.chmod(modes[file.parent])


def _mode_of_a_new_file(folder: Path) -> int:
    # Asking for the umask means setting it, for all threads of the process, and a folder may have defaults of its own.
    probe = folder / f".{uuid.uuid4().hex}"
    probe.touch()
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
