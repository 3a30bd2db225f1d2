"""A strategy in the `setup` of a run: the model has to exist by then, and nobody may have copied it."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging

from lowrank_pl.errors.run import UnsupportedCallbackError


def build(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Calls a module's `configure_model` in the contexts in which Lightning calls it later, once more.

    Lightning asks of every `configure_model` that it does nothing the second time.
    """
    with (
        trainer.strategy.tensor_init_context(),
        trainer.strategy.model_sharded_context(),
        trainer.precision_plugin.module_init_context(),
    ):
        pl_module.configure_model()


def check_nothing_comes_before(strategy: pl.Callback, trainer: pl.Trainer) -> None:
    """Raises an error for callbacks ahead of the strategy that copy or freeze the layers which it is going to exchange.

    Raises:
        UnsupportedCallbackError: naming the first.
    """
    callbacks: list[pl.Callback] = getattr(trainer, "callbacks")  # noqa: B009, set without a type
    for callback in callbacks[: callbacks.index(strategy)] if strategy in callbacks else ():
        if isinstance(callback, (BaseFinetuning, StochasticWeightAveraging, WeightAveraging)):
            name = type(strategy).__name__
            problem = f"its setup comes before that of {name} and would copy or freeze layers that {name} exchanges"
            remedy = f"Name {name} first: Trainer(callbacks=[{name}(…), {type(callback).__name__}(…)])."
            raise UnsupportedCallbackError(type(callback).__name__, problem, remedy)
