"""The folder that a command makes: looked at before any work, written at its end or while it goes on."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from lowrank_pl.files.atomic import TO_REPLACE, all_or_nothing, check_output, errors_told


class OutputFolder:
    """A folder that may be new or empty, or replaced where the user says so; the same rules before work and after it.

    Args:
        path: As the user gave it.
        overwrite: Whether what is there may be replaced; `None` where the command offers no such choice.
        remedy: What else to do about a folder with content, for messages.

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: str | Path, overwrite: bool | None = None, remedy: str | None = None) -> None:
        self.path = Path(path).expanduser()
        self._overwrite = bool(overwrite)
        self._remedy = TO_REPLACE if remedy is None and overwrite is not None else remedy

    def check(self) -> None:
        """Raises an error before any work where it cannot be written; see `check_output`.

        Raises:
            OutputExistsError: something is there and may not be replaced.
            OutputNotWritableError: nothing can be made there.
        """
        check_output(self.path, self._overwrite, self._remedy)

    def written_whole(self) -> AbstractContextManager[Path]:
        """A new folder that takes its place when the `with` block has succeeded; see `all_or_nothing`.

        Raises:
            OutputExistsError: something has appeared there.
            OutputNotWritableError: a file or folder cannot be written.
        """
        return all_or_nothing(self.path, self._overwrite, self._remedy)

    def beside(self, ending: str) -> Path:
        """Where what a run needs until its output is there may lie: the folder's name with an ending."""
        return self.path.with_name(f"{self.path.name}.{ending}")

    def begun(self) -> Path:
        """Makes it at once, for work whose results are kept as they come in.

        Raises:
            OutputNotWritableError: it cannot be made.
        """
        with errors_told(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        return self.path


def replace_text(path: Path, text: str) -> Path:
    """Writes a text file in the place of another: at any moment it is the old one or the new one.

    Returns:
        The file.

    Raises:
        OSError: the disk is full, for instance; the old one stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
