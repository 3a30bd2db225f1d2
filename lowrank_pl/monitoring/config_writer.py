"""The configuration of a run, beside what the run writes."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback

from lowrank_pl.errors.outputs import RunFolderInUseError
from lowrank_pl.monitoring.run_folder import CONFIG_NAME, run_folder
from lowrank_pl.monitoring.run_logger import RunLogger
from lowrank_pl.strategies.processes import Agreement


class ConfigWriter(SaveConfigCallback):
    """Leaves `config.yaml` in the run folder; where there is none, as without a logger, it writes nothing."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Writes the file, once.

        Raises:
            RunFolderInUseError: the folder holds the configuration of another run.
        """
        del pl_module, stage
        if self.already_saved:
            return
        self.already_saved = True
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.adopt(trainer.strategy.broadcast(logger.version))
        folder = run_folder(trainer)
        if folder is None:
            return
        with Agreement(trainer):
            if trainer.is_global_zero:
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / CONFIG_NAME
                try:
                    path.touch(exist_ok=False)  # of two runs that start at once, one is the first
                except FileExistsError as error:
                    raise RunFolderInUseError(str(folder)) from error
                self.parser.save(self.config, str(path), skip_unset=False, overwrite=True, multifile=self.multifile)
