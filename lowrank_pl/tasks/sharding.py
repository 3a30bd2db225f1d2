"""FSDP2: an encoder whose shapes are final is divided among processes, block by block."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from lowrank_pl.errors.parallelism import UnevenValidationError
from lowrank_pl.strategies.processes import gathered

RESUMED = "a run that is resumed under it goes on a little differently than one that was not stopped"
"""Why a checkpoint is not resumed by processes of which each has a part of the parameters."""


def shard_(encoder: nn.Module, mesh: Any) -> None:
    """Divides the parameters of an encoder among the processes of a mesh, once; a second call changes nothing.

    Every block, an entry of an outermost `nn.ModuleList`, is put together for its own forward and backward pass alone,
    and what lies outside the blocks, embeddings and head, as one more. Tied parameters stay tied, since they lie there.
    The parameters are others afterwards: no optimizer may exist.

    Args:
        encoder: On this process's device, with the same values on all processes.
        mesh: One-dimensional `DeviceMesh`.
    """
    if is_sharded(encoder):
        return
    for block in _blocks(encoder):
        fully_shard(block, mesh=mesh)
    # Left to itself a root stays whole after a validation: the optimizer would not find its parameters in the model.
    fully_shard(encoder, mesh=mesh, reshard_after_forward=True)


def is_sharded(encoder: nn.Module) -> bool:
    """Whether `shard_` has divided it."""
    return isinstance(encoder, FSDPModule)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The entries of every outermost `nn.ModuleList` that have parameters."""
    if isinstance(module, nn.ModuleList):
        return [block for block in module if any(True for _ in block.parameters())]
    return [block for child in module.children() for block in _blocks(child)]


class EvenValidation(pl.Callback):
    """Lets all processes run as many forward passes of a divided model, in which all of them take part.

    No sample is scored twice, so that some processes may have a batch less than others, and would end the validation
    while those wait. They run their last batch once more, and count nothing of it.
    """

    def __init__(self) -> None:
        self._missing = 0
        self._batch: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tensors of torch's inference mode, which the parts are put together in, could not be trained afterwards."""
        del pl_module, stage
        trainer.fit_loop.epoch_loop.val_loop.inference_mode = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts the batches of all processes.

        Raises:
            UnevenValidationError: a process has none at all.
        """
        del pl_module
        numbers: Any = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        counts = gathered(trainer, int(sum(numbers)))
        self._missing = max(counts) - counts[trainer.global_rank]
        if min(counts) == 0 < max(counts):
            raise UnevenValidationError(counts.index(0), trainer.world_size)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keeps the last batch where it is needed."""
        del trainer, pl_module, outputs
        if self._missing:
            self._batch = batch

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs it, before the module compares scores with the other processes."""
        del trainer
        for _ in range(self._missing):
            pl_module(self._batch)
        self._missing, self._batch = 0, None
