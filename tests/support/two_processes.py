"""Runs the command line and saves each process's factorised products: `two_processes.py FOLDER ARGUMENTS…`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lowrank_pl.cli import main
from lowrank_pl.nn import LowRankLinear
from lowrank_pl.strategies import FWSVD


def products(pl_module: Any) -> dict[str, torch.Tensor]:
    """What every factorised layer multiplies with."""
    modules = pl_module.encoder.named_modules()
    return {n: m.product().detach().clone() for n, m in modules if isinstance(m, LowRankLinear)}


def record(folder: Path) -> None:
    """Wraps the strategy's hooks to save the products after writing and after training."""
    start, found = FWSVD.on_train_start, {}

    def on_train_start(self: FWSVD, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start(self, trainer, pl_module)
        found["written"] = products(pl_module)

    def on_train_end(self: FWSVD, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found["trained"] = products(pl_module)
        torch.save(found, folder / f"rank-{trainer.global_rank}.pt")

    FWSVD.on_train_start = on_train_start  # type: ignore[method-assign,assignment]
    FWSVD.on_train_end = on_train_end  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    record(Path(sys.argv[1]))
    main(sys.argv[2:])
