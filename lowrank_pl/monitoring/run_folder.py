"""Where a run writes: one folder, the same on all processes, and never another run's."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lowrank_pl.errors.outputs import RunFolderInUseError

CONFIG_NAME = "config.yaml"


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The folder for reports, pictures and predictions. A collective operation: every process must call it.

    Returns:
        The folder of the first logger: that of TensorBoard or CSV files, `<save_dir>/<name>/<version>` of others.
        Without a logger `default_root_dir`, unless that is the working folder, which is no run's own. `None` where
        there is no such folder, and under `fast_dev_run`.
    """
    if getattr(trainer, "fast_dev_run", False):
        return None
    # The other processes' loggers number their versions on their own.
    folder = trainer.strategy.broadcast(_folder(trainer) if trainer.is_global_zero else None)
    return None if folder is None else Path(folder)


def check_unused(trainer: pl.Trainer) -> None:
    """Raises an error for a version that was asked for and is taken, before anything is written into its folder.

    Raises:
        RunFolderInUseError: another run's configuration lies there.
    """
    for logger in trainer.loggers:
        # A version that is still to be chosen will be a free one; Lightning has no public way to ask.
        chosen = getattr(logger, "_version", None) is not None
        if chosen and trainer.is_global_zero:
            folder = _folder_of(logger)
            if folder is not None and (Path(folder) / CONFIG_NAME).exists():
                raise RunFolderInUseError(folder)


def _folder(trainer: pl.Trainer) -> str | None:
    folder = _folder_of(trainer.loggers[0]) if trainer.loggers else None
    if folder is None:
        root = Path(trainer.default_root_dir)
        folder = None if root.resolve() == Path.cwd() else str(root)
    return folder


def _folder_of(logger: Logger) -> str | None:
    """A logger's own folder; `None` for one that writes no files."""
    if isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return str(logger.log_dir)
    if logger.save_dir is None:
        return None
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return str(Path(logger.save_dir) / str(logger.name) / version)
