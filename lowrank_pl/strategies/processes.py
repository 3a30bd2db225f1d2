"""Several processes: which kinds are supported, how they share work, and how all learn that one of them has failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies import Strategy as Parallelism
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from tqdm.auto import tqdm

from lowrank_pl.errors.parallelism import ProcessFailedError, StartMethodError, UnsupportedParallelismError

Result = TypeVar("Result")


_WHOLE = "shapes, checkpoints and reports need whole weight matrices on every process"
_REASONS: dict[type[Parallelism], str] = {
    FSDPStrategy: "FSDP1 flattens the parameters of a block into one vector, in which the factors of a layer are lost",
    DeepSpeedStrategy: "its engine takes over parameters, optimizer and checkpoints, which then tell nothing of ranks",
}


def shards(parallelism: Parallelism) -> bool:
    """Whether it divides parameters among processes, where that is supported at all."""
    return type(parallelism) is ModelParallelStrategy


def check_parallelism(parallelism: Parallelism, asked_by: str, why_not_sharded: str = "") -> None:
    """Raises an error for what is not tested, subclasses included: DeepSpeed's is one of DDP's.

    Args:
        parallelism: The trainer's `strategy`.
        asked_by: Who cannot work under it, for the message.
        why_not_sharded: Why parameters cannot be divided among processes here; empty where they can.

    Raises:
        UnsupportedParallelismError: neither a single device, nor DDP, nor FSDP2 where it is supported.
        StartMethodError: DDP in processes that fork from this one or are spawned by it. The encoder is built in those
            processes, so the process that started them would be left without the trained one.
    """
    name = type(parallelism).__name__
    if shards(parallelism):
        if reason := why_not_sharded or _misconfigured(parallelism):
            raise UnsupportedParallelismError(asked_by, name, reason)
        return
    if type(parallelism) not in (SingleDeviceStrategy, DDPStrategy):
        reason = next((told for kind, told in _REASONS.items() if isinstance(parallelism, kind)), _WHOLE)
        raise UnsupportedParallelismError(asked_by, name, reason)
    method = getattr(parallelism, "_start_method", "popen")  # Lightning has no public name for it
    if method != "popen":
        raise StartMethodError(asked_by, method)


def check_parallelism_named(name: str, asked_by: str) -> None:
    """The same for a kind that is only named yet, before Lightning asks for a package or a device that it needs.

    Args:
        name: Lightning's short name or the class, such as `deepspeed_stage_2`; others than those refused pass.
        asked_by: Who cannot work under it, for the message.

    Raises:
        UnsupportedParallelismError: it is known to be refused.
    """
    for kind, reason in _REASONS.items():
        short = kind.__name__.removesuffix("Strategy").lower()
        if name == kind.__name__ or name.split("_")[0] == short:
            raise UnsupportedParallelismError(asked_by, name, reason)


def _misconfigured(parallelism: Any) -> str:
    """What of a `ModelParallelStrategy` is not supported; Lightning has no public names for its arguments."""
    if (size := parallelism._tensor_parallel_size) != 1:
        return f"tensor_parallel_size={size!r} would split matrices by plans that know no factors; it has to be 1"
    if parallelism._save_distributed_checkpoint:
        return "save_distributed_checkpoint=True would leave a folder of shards, which no verb reads; set it to false"
    return ""


def assign(costs: Mapping[str, float], processes: int) -> dict[str, int]:
    """Divides jobs among processes: each in turn, the costliest first, goes to the process with the least to do.

    Args:
        costs: By job, in any unit.
        processes: How many there are, from 1.

    Returns:
        The rank of the process that does each job, in the order of `costs`; the same on every process.
    """
    loads = [0.0] * processes
    owners = dict.fromkeys(costs, 0)
    for job in sorted(costs, key=lambda job: -costs[job]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return owners


def work_shared(
    trainer: pl.Trainer, owners: Mapping[str, int], work: Callable[[str], Result], description: str
) -> dict[str, Result]:
    """Every process does its own jobs; all get the results of all. Every process must call it.

    Args:
        trainer: Whose processes they are.
        owners: The rank that does each job, see `assign`.
        work: Does one job; its result is sent as a pickle.
        description: For the progress bar, which shows the first process's own jobs.

    Returns:
        Results by job, in the order of `owners`.

    Raises:
        ProcessFailedError: a job has failed on another process. Where it is one of this process, its own error.
    """
    mine = [job for job, rank in owners.items() if rank == trainer.global_rank]
    done: dict[str, Result] = {}
    with Agreement(trainer):
        for job in progress(trainer, mine, description, len(mine)):
            done[job] = work(job)
    found: dict[str, Result] = {}
    for share in gathered(trainer, done):
        found |= share
    return {job: found[job] for job in owners}


class Agreement:
    """A `with` block that all processes leave in the same way: if it raises on one of them, it raises on all.

    Without it a process that fails leaves the others waiting in their next collective operation. The block itself may
    hold one such operation, if `settle` is called immediately before it. Every process must enter the block.

    Args:
        trainer: Whose processes they are.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._settled = False

    def __enter__(self) -> Agreement:
        """Starts the block."""
        self._settled = False
        return self

    def settle(self) -> None:
        """Waits for all processes.

        Raises:
            ProcessFailedError: another one has failed.
        """
        self._settled = True
        _agree(self._trainer, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Waits for all processes, unless that has been done before. An interrupt does not wait."""
        if not self._settled and (error is None or isinstance(error, (Exception, SIGTERMException))):
            _agree(self._trainer, error)


def _agree(trainer: pl.Trainer, error: BaseException | None) -> None:
    """Raises `ProcessFailedError` if another process has given an error and this one has not."""
    told = None if error is None else f"{type(error).__name__}: {error}"
    for rank, problem in enumerate(gathered(trainer, told)):
        if problem is not None and error is None:
            raise ProcessFailedError(rank, problem)


def gathered(trainer: pl.Trainer, value: Result) -> list[Result]:
    """The values of all processes, in order of rank."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def sum_(trainer: pl.Trainer, tensor: Tensor) -> None:
    """Overwrites a tensor with the sum of those of all processes."""
    if trainer.world_size > 1:
        torch.distributed.all_reduce(tensor)


def send_(trainer: pl.Trainer, tensor: Tensor, source: int) -> None:
    """Overwrites a tensor with that of the process `source`, bit for bit, on all processes."""
    if trainer.world_size > 1:
        torch.distributed.broadcast(tensor, src=source)


def progress(trainer: pl.Trainer, items: Iterable[Result], description: str, total: int) -> Iterator[Result]:
    """The items of long work outside of training, where a run may end: before each of them.

    A progress bar shows them on the first process, unless the trainer's own is switched off.

    Raises:
        SIGTERMException: the run was asked to stop. Lightning itself looks only between batches of its own loops.
    """
    hidden = not trainer.is_global_zero or trainer.progress_bar_callback is None
    for item in tqdm(items, desc=description, total=total, disable=hidden):
        if trainer.received_sigterm:
            raise SIGTERMException
        yield item
