"""SIGTERM in several processes: all of them end at the same step."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

logger = logging.getLogger(__name__)


class AgreedStop:
    """Takes the place of what Lightning does at a SIGTERM, for a trainer of several processes.

    Lightning broadcasts inside the signal's handler, and each process leaves where it is. Where the others are in
    another collective operation, such as that of the gradients, all wait for ever. Here the handler only remembers the
    signal and passes it to the processes that this one has started; at the start of every training batch, where
    Lightning asks anyway, the processes tell each other whether any was to stop. Before the first batch, and where
    nothing is trained, each ends at the next place that looks: a batch of Lightning's loops, or an item of `progress`.

    Args:
        trainer: Whose processes they are.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._asked = False
        self._training = False

    def install(self) -> None:
        """Replaces Lightning's methods; they are private, and where there is none of the name its own way stays."""
        connector: Any = getattr(self._trainer, "_signal_connector", None)
        loop: Any = self._trainer.fit_loop.epoch_loop
        if hasattr(connector, "_sigterm_notifier_fn") and hasattr(loop, "_broadcast_sigterm_tensor"):
            connector._sigterm_notifier_fn = self.remember
            loop._broadcast_sigterm_tensor = self.agree

    def remember(self, number: int, frame: object = None) -> None:
        """The handler: no communication in it."""
        del frame
        trainer: Any = self._trainer
        logger.info("[rank: %d] Received SIGTERM: %d", trainer.global_rank, number)
        launcher = trainer.strategy.launcher
        if launcher is not None and not self._asked:
            launcher.kill(number)
        self._asked = True
        if trainer.world_size == 1 or not self._training:
            trainer._signal_connector.received_sigterm = True

    def agree(self) -> None:
        """Asks all processes; a collective operation.

        Raises:
            SIGTERMException: on all of them, where any was to stop.
        """
        self._training = True
        asked = torch.tensor([int(self._asked)], device=self._trainer.strategy.root_device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if asked.item():
            raise SIGTERMException
