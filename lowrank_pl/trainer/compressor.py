"""Compression in the middle of a validation run, where model, data, device and processes are all in place."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from lowrank_pl.tasks import EncoderTask


class Compressor(pl.Callback):
    """First checks that the strategy's plan is possible; once `armed`, compresses before scores are taken."""

    def __init__(self) -> None:
        self.armed = False
        self.done = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plans, or compresses."""
        assert isinstance(pl_module, EncoderTask)
        # Validation runs in inference mode, whose tensors could never be trained afterwards.
        with torch.inference_mode(False), torch.enable_grad():
            if self.armed:
                pl_module.strategy.compress(trainer, pl_module)
                self.done = True
            else:
                pl_module.strategy.check(pl_module.encoder)
