"""Scores and predictions of a model that puts out NaN are refused where no work is lost by it."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lowrank_pl.errors.numerics import NonFiniteScoreError
from lowrank_pl.importance.finite import first_not_finite
from lowrank_pl.strategies.processes import gathered, shards

_SPLITS = {"val": "validation", "test": "test"}


def is_refused(trainer: pl.Trainer) -> bool:
    """Whether a loss that is not finite ends the run: not once it has trained, which leaves checkpoints and a report.

    Args:
        trainer: In a validation or a test.
    """
    return trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking


def refuse_together(pl_module: pl.LightningModule, stage: str, batch: Mapping[str, Tensor] | None) -> None:
    """Raises an error where a process has met a loss that is not finite; every process must call it.

    Args:
        pl_module: With the encoder, in eval mode.
        stage: `"val"` or `"test"`.
        batch: The first one that this process has met; `None` for none.

    Raises:
        NonFiniteScoreError: there is one; it names the first module that puts out NaN or Inf.
    """
    own = None if batch is None else _origin(pl_module, batch)
    found = [told for told in gathered(pl_module.trainer, own) if told is not None]
    if found:
        origin = next((told for told in found if told), "")
        raise NonFiniteScoreError(f"the loss of a {_SPLITS[stage]} batch", origin)


def check_predictions(pl_module: pl.LightningModule, batch: Mapping[str, Tensor], logits: Tensor) -> None:
    """Raises an error for predictions that are none; each process by itself, since they wait for none.

    Args:
        pl_module: With the encoder, in eval mode.
        batch: What was put in.
        logits: What came out.

    Raises:
        NonFiniteScoreError: there is a NaN in it.
    """
    if bool(logits.isnan().any()):
        raise NonFiniteScoreError("what the model predicts", _origin(pl_module, batch))


def _origin(pl_module: pl.LightningModule, batch: Mapping[str, Tensor]) -> str:
    """Where NaN or Inf first come up; empty where that cannot be told."""
    trainer, encoder = pl_module.trainer, pl_module.encoder
    assert isinstance(encoder, nn.Module)
    if shards(trainer.strategy):  # other processes would have to run it too
        return ""
    with trainer.precision_plugin.forward_context():
        return first_not_finite(dict(encoder.named_modules()), lambda: pl_module(batch)) or ""
