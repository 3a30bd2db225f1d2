"""Runs of the command line in worker processes: in their order, and none that is done."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tables import Report


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: Where its report.json will be.
        arguments: Of `python -m lowrank_pl`.
        after: The run whose checkpoint it starts from, if there is one.
        keep: Keep checkpoints, which others start from; they are megabytes each.
    """

    folder: Path
    arguments: tuple[str, ...]
    after: Run | None = None
    keep: bool = False

    @property
    def report(self) -> Report | None:
        """What it found, `None` before it is done."""
        path = self.folder / "report.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @property
    def has_checkpoint(self) -> bool:
        """Whether another run can start from what it has left."""
        return any(self.folder.rglob("*.ckpt"))

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.folder.with_name(f"{self.folder.name}.log")


def run_all(runs: list[Run], workers: int, threads: int | None) -> list[Run]:
    """Does what is not done yet, earlier ones of the list first, so many at a time. Returns those that failed.

    A run that others wait for is done even if it is not in the list. What waits for one that failed has failed, too.

    Raises:
        SystemExit: something starts from a checkpoint that is gone, of a run whose report is there.
    """
    waiting = [run for run in _with_needs(runs) if run.report is None]
    _check_checkpoints(waiting)
    total, failed, began = len(waiting), set[Run](), time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(threads,)) as pool:
        active: dict[Future[int], Run] = {}
        while waiting or active:
            for run in waiting:  # every run stands behind the one that it waits for
                if run.after in failed:
                    failed.add(run)
            waiting = [run for run in waiting if run not in failed]
            busy = {*waiting, *active.values()}
            ready = [run for run in waiting if run.after not in busy]
            for run in ready[: workers - len(active)]:
                waiting.remove(run)
                active[pool.submit(_execute, run)] = run
            done, _ = wait(active, return_when=FIRST_COMPLETED)
            for future in done:
                run = active.pop(future)
                if _code(future):
                    failed.add(run)
                    print(f"failed: {run.folder}; see {run.log}", flush=True)
                told = f"{total - len(waiting) - len(active)} of {total}, {time.monotonic() - began:.0f} s"
                print(f"{told}: {run.folder}", flush=True)
    return sorted(failed, key=lambda run: run.folder)


def _with_needs(runs: list[Run]) -> list[Run]:
    """Every run once, after what it waits for."""
    found: dict[Run, None] = {}
    for run in runs:
        if run.after is not None:
            found.update(dict.fromkeys(_with_needs([run.after])))
        found.setdefault(run)
    return list(found)


def _check_checkpoints(runs: list[Run]) -> None:
    """Ends the study where a run starts from a finished one whose checkpoint is gone: no report is overwritten."""
    needed = {run.after for run in runs if run.after is not None and run.after.report is not None}
    if gone := sorted(str(run.folder) for run in needed if not run.has_checkpoint):
        raise SystemExit(
            f"{len(gone)} finished runs have a report and no checkpoint, from which others start: remove their "
            f"folders, and they are done again: {' '.join(gone)}"
        )


def _code(future: Future[int]) -> int:
    try:
        return future.result()
    except BrokenProcessPool:
        raise SystemExit("A worker process was killed, perhaps for want of memory: try fewer --workers.") from None


def _prepare(threads: int | None) -> None:
    """In the worker, once: its share of the threads."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _going_on(run: Run) -> list[str]:
    """What makes a training run that was stopped go on after its last epoch; of another, nothing is left."""
    checkpoint = run.folder / "checkpoints" / "last.ckpt"
    if run.arguments[0] == "fit" and checkpoint.exists():
        (run.folder / "config.yaml").unlink(missing_ok=True)  # which says that a run has this folder
        return [f"--ckpt_path={checkpoint}"]
    shutil.rmtree(run.folder, ignore_errors=True)
    return []


def _execute(run: Run) -> int:
    """In the worker: one run with its output in a log file."""
    from lowrank_pl.cli import console

    run.folder.parent.mkdir(parents=True, exist_ok=True)
    sys.argv = ["lowrank-pl", *run.arguments, *_going_on(run)]
    descriptor = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    before = [(stream, os.dup(stream)) for stream in (1, 2)]
    try:
        for stream, _ in before:
            os.dup2(descriptor, stream)
        console()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):  # what Python prints at the end of a process
            print(stop.code, file=sys.stderr)
    except Exception:  # a bug in a run must not end the others; its traceback is in the log
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, saved in before:
            os.dup2(saved, stream)
            os.close(saved)
        os.close(descriptor)
    if code:  # a report of what went wrong is none of a run that is done
        (run.folder / "report.json").unlink(missing_ok=True)
    if code or not run.keep:
        for path in run.folder.rglob("*.ckpt"):
            path.unlink()
    return code
