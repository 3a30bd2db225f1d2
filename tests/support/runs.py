"""Short runs on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lowrank_pl.strategies import CompressionStrategy
from lowrank_pl.tasks import SequenceClassification
from lowrank_pl.trainer import LowRankTrainer


def make_trainer(folder: Path, **arguments: Any) -> LowRankTrainer:
    """A quiet trainer on one CPU device with a TensorBoard logger below `folder`."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "default_root_dir": folder,
        "logger": TensorBoardLogger(folder, "runs"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return LowRankTrainer(**{**defaults, **arguments})


def make_task(pretrained: str | None, strategy: CompressionStrategy | None = None, **arguments: Any) -> Any:
    """A classifier whose head is the same every time."""
    pl.seed_everything(0, verbose=False)
    arguments.setdefault("optimizer", lambda params: torch.optim.AdamW(params, lr=1e-2))
    return SequenceClassification(pretrained, strategy=strategy, **arguments)


def last_checkpoint(trainer: pl.Trainer) -> str:
    """The checkpoint that a run wrote."""
    path = str(getattr(trainer.checkpoint_callback, "best_model_path", ""))
    assert path
    return path
