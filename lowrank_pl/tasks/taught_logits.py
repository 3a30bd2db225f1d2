"""What a teacher says of the training samples, asked once and kept. b: samples, t: tokens, c: classes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor

from lowrank_pl.strategies.calibration import Calibration, calibration_batches
from lowrank_pl.strategies.processes import Agreement, gathered, progress
from lowrank_pl.tasks.teacher import Teacher

logger = logging.getLogger(__name__)

_READ = ("input_ids", "token_type_ids")


class TaughtLogits:
    """Logits by what a sample reads: its tokens without padding, wherever and in whatever batch it turns up.

    Copies of a module share it, like the teacher.
    """

    def __init__(self) -> None:
        self._rows: dict[bytes, Tensor] = {}
        self._has_told = False

    def __deepcopy__(self, memo: object) -> TaughtLogits:
        return self

    def ask(self, trainer: pl.Trainer, teacher: Teacher) -> None:
        """Asks the teacher for every training sample, in an order that does not depend on the epoch.

        A resumed run therefore gets the same numbers bit for bit, which depend, in their last digits, on what else is
        in a batch. Each process asks for its share. Every process must call it.

        Raises:
            CalibrationError: the data do not hand out their samples in order.
        """
        batches = calibration_batches(trainer, Calibration(), "distillation.cache")
        parallelism, own = trainer.strategy, TaughtLogits()
        with Agreement(trainer), trainer.precision_plugin.train_step_context():
            for batch in progress(trainer, batches, "Teacher", len(batches)):
                logits, _ = teacher(parallelism.batch_to_device(batch, parallelism.root_device), hidden_states=False)
                own.keep(batch, logits)
        self._rows = {key: row for share in gathered(trainer, own._rows) for key, row in share.items()}

    def keep(self, batch: Mapping[str, Tensor], logits: Tensor) -> None:
        """Adds a batch's logits `[b, c]`, or `[b, t, c]` without those at padding."""
        logits = logits.cpu()
        for row, (key, read) in enumerate(_keys(batch)):
            self._rows[key] = (logits[row] if logits.ndim == 2 else logits[row][read]).clone()

    def find(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The logits of a batch, on its device; `None` if a sample of it was never asked for.

        Those of tokens are 0 at padding.
        """
        keys = list(_keys(batch))
        rows = [self._rows[key] for key, _ in keys if key in self._rows]
        if len(rows) < len(keys):
            if self._rows and not self._has_told:
                self._has_told = True
                logger.warning(
                    "distillation.cache: a training batch has samples that the data do not hand out otherwise; "
                    "the teacher is asked for every batch of this kind"
                )
            return None
        device = batch["input_ids"].device
        if rows[0].ndim == 1:
            return torch.stack(rows).to(device)
        found = torch.zeros(*batch["input_ids"].shape, rows[0].shape[-1])
        for place, row, (_, read) in zip(found, rows, keys, strict=True):
            place[read] = row
        return found.to(device)


def _keys(batch: Mapping[str, Tensor]) -> list[tuple[bytes, Tensor]]:
    """For each sample a digest of what it reads, and which tokens `[t]` are no padding."""
    tensors = [batch[name].cpu() for name in _READ if name in batch]
    mask = batch["attention_mask"].cpu() != 0 if "attention_mask" in batch else torch.ones_like(tensors[0]).bool()
    found = []
    for row, read in enumerate(mask):
        digest = hashlib.blake2b(digest_size=16)
        for tensor in tensors:
            digest.update(tensor[row][read].numpy().tobytes())
        found.append((digest.digest(), read))
    return found
