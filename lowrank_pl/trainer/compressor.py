"""Compression in the middle of a validation run, where model, data, device and processes are all in place."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from lowrank_pl.strategies import CompressionStrategy


class Compressor(pl.Callback):
    """First checks that what the strategy is asked for is possible; once `armed`, compresses before scores are taken.

    Args:
        strategy: The module's.
    """

    def __init__(self, strategy: CompressionStrategy) -> None:
        self.strategy = strategy
        self.armed = False
        self.done = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plans, or compresses."""
        # Validation runs in inference mode, whose tensors could never be trained afterwards.
        with torch.inference_mode(False), torch.enable_grad():
            if self.armed:
                self.strategy.compress(trainer, pl_module)
                self.done = True
            else:
                self.strategy.check_compress(trainer, pl_module)
