"""TensorBoard for runs that may start at the same time."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


class RunLogger(TensorBoardLogger):
    """Lightning's `TensorBoardLogger`, whose arguments it takes, with a version that no other run gets.

    Without a `version`, `version_<n>` is the next free number, as Lightning counts. The folder is made at once, by the
    first process, and making it fails where another run has been faster: that run keeps its number and this one takes
    the next.
    """

    @property
    def version(self) -> int | str:
        """The version that was given, or the one that this run has claimed."""
        if self._version is None and getattr(rank_zero_only, "rank", 0) == 0:
            self._version = self._claim()
        return super().version

    def adopt(self, version: int | str) -> None:
        """Takes over the version that the first process has claimed."""
        self._version = version

    def _claim(self) -> int:
        root = Path(self.root_dir).expanduser()
        root.mkdir(parents=True, exist_ok=True)
        version = self._get_next_version()
        while True:
            try:
                (root / f"version_{version}").mkdir()
            except FileExistsError:
                version += 1
            else:
                return version
