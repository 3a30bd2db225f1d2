"""The encoder before everything else: callbacks that copy, freeze or list a model in `setup` find it there."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import lightning.pytorch as pl


@runtime_checkable
class BuildsInSetup(Protocol):
    """What a module offers for it."""

    def check_run(self, stage: str) -> None:
        """Raises an error for a run that cannot work."""
        ...

    def configure_model(self) -> None:
        """Builds the layers, once."""
        ...


class EncoderFirst(pl.Callback):
    """Lets the module check the run and build its encoder in `setup`, ahead of the other callbacks.

    Lightning calls `configure_model` after `setup`, where `StochasticWeightAveraging` copies the model and
    `BaseFinetuning` freezes layers: of a module that builds its layers later they would get nothing.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks, then builds, in the contexts in which Lightning builds."""
        assert isinstance(pl_module, BuildsInSetup)
        pl_module.check_run(stage)
        with (
            trainer.strategy.tensor_init_context(),
            trainer.strategy.model_sharded_context(),
            trainer.precision_plugin.module_init_context(),
        ):
            pl_module.configure_model()
