"""A compression by blocks that is killed as it writes, again and again: `killed_blocks.py MODEL FOLDER`.

Each start runs in a fork of this process and goes on from what the one before it has left.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from lowrank_pl.strategies import Calibration, KroneckerSVD
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import SyntheticData


def compress(model: str, output: Path) -> None:
    """What is stopped, and what goes on."""
    strategy = KroneckerSVD(
        keep_ratio=0.5, refit=False, sequential=True, calibration=Calibration(cache=False, max_samples=32)
    )
    trainer = make_trainer(output.parent, logger=False)
    trainer.compress(make_task(model, strategy), SyntheticData(), str(output))


def kill_at_write(number: int) -> None:
    """Kills this process before a file gets its name, with its content beside it."""
    real, writes = Path.replace, [0]

    def replace(path: Path, target: Any) -> Path:
        writes[0] += ".blocks" in str(path)
        if writes[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, target)

    Path.replace = replace  # type: ignore[method-assign, assignment]


def start(model: str, output: Path, number: int) -> int:
    """Starts in a fork; returns its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        kill_at_write(number)
        try:
            compress(model, output)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


AT = (1, 5, 20, 21, 2, 2)
"""Writes of each start: what it is about, a moment, what was measured, the first block, and the next two."""


def main(model: str, output: Path) -> None:
    """Starts once for each place, and a last time."""
    torch.set_num_threads(1)  # a fork has no other threads
    codes = [start(model, output, number) for number in (*AT, 0)]
    print(codes, flush=True)
    sys.exit(codes != [-signal.SIGKILL] * len(AT) + [0])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
