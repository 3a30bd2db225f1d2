r"""What a user would pick instead: eight bits, fewer layers, low rank, and all of it together, on one frontier.

Every row is a model of a task, written as an ONNX file in float32 and in eight bits and scored as that file:

    dense        fine-tuned, as it is
    low rank     KroneckerSVD at several keep_ratios, untuned and tuned for as long again
    vocabulary   the same with the embeddings in the budget
    distilled    tuned towards the dense model
    half         the first half of the layers, tuned for as long again

    python studies/alternatives.py --glue PATH/TO/glue --output logs/alternatives --tasks MRPC STS-B

A stopped run goes on where it was. Writes alternatives.md, alternatives.json and two pictures: score over megabytes,
and score over time. Times are measured once, on the models of the first task, by --benchmark: run nothing beside it.
Minutes are what a model takes beyond the dense one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from grid import Cells
from matplotlib.figure import Figure
from methods import STRATEGY
from options import TRAINING, parser, read
from runs import Run, run_all
from tables import header, line, write

from lowrank_pl.checkpoint import load_model

SAMPLES = f"{STRATEGY}.init_args.calibration.max_samples=2048"
EMBEDDINGS = f"{STRATEGY}.init_args.targets.init_args.embeddings=true"
SIZES = ((1, 16), (8, 64), (32, 128))
"""Batch and length of the times."""


def _low_rank(ratio: str, *options: str) -> tuple[str, ...]:
    return (f"{STRATEGY}=KroneckerSVD", SAMPLES, f"{STRATEGY}.init_args.keep_ratio={ratio}", *options)


@dataclass(frozen=True)
class Row:
    """One alternative.

    Attributes:
        name: In the table.
        words: Of the command line, beside data and start.
        tuned: Whether it is trained for as long again as the dense model was.
        half: Whether it starts from half of the layers.
    """

    name: str
    words: tuple[str, ...] = ()
    tuned: bool = False
    half: bool = False


ROWS = (
    Row("dense"),
    *(Row(f"KroneckerSVD {ratio}", _low_rank(ratio)) for ratio in ("0.5", "0.33", "0.2")),
    *(Row(f"KroneckerSVD {ratio} tuned", _low_rank(ratio), tuned=True) for ratio in ("0.5", "0.33", "0.2", "0.1")),
    *(Row(f"with vocabulary {ratio}", _low_rank(ratio, EMBEDDINGS)) for ratio in ("0.33", "0.2")),
    *(Row(f"with vocabulary {r} tuned", _low_rank(r, EMBEDDINGS), tuned=True) for r in ("0.33", "0.2", "0.1", "0.05")),
    *(
        Row(
            f"with vocabulary {ratio} distilled",
            _low_rank(ratio, EMBEDDINGS, "--model.init_args.distillation=Distillation"),
            tuned=True,
        )
        for ratio in ("0.2", "0.1", "0.05")
    ),
    Row("half of the layers", (f"{STRATEGY}=NoCompression",), tuned=True, half=True),
)


class Task:
    """The runs of one task: models, and the files made of them."""

    def __init__(self, arguments: argparse.Namespace, task: str) -> None:
        self.cells = Cells(arguments, task, 0)
        self.name, self.folder = self.cells.name, self.cells.folder

    @property
    def dense(self) -> Run:
        """The dense model."""
        return self.cells.dense

    def model(self, row: Row) -> Run:
        """The run that makes the model of a row."""
        if row.name == "dense":
            return self.dense
        name = row.name.replace(" ", "-")
        start = str(self.folder / "half") if row.half else str(self.dense.folder / "checkpoints" / "last.ckpt")
        words = (*row.words, f"--model.init_args.init_from={start}")
        if row.tuned:
            return self.cells.fit(name, list(words), self.dense, keep=True)
        return self.cells.compress(name, list(words), keep=True)

    def checkpoint(self, row: Row) -> Path:
        """Where its model is."""
        folder = self.model(row).folder
        return folder / "checkpoints" / "last.ckpt" if row.tuned or row.name == "dense" else folder / "model.ckpt"

    def file(self, row: Row, int8: bool) -> Run:
        """The run that writes and scores a file of a row."""
        made = self.model(row)
        folder = self.folder / f"{'int8' if int8 else 'float'}-{row.name.replace(' ', '-')}"
        words = ["export", "--ckpt_path", str(self.checkpoint(row)), "--output", str(folder), "--format", "onnx"]
        words += ["--quantize", "int8"] if int8 else []
        return Run(folder, (*words, *self.cells.data), made)

    def halve(self) -> None:
        """Writes the first half of the dense model's layers as a folder, unless it is there."""
        folder = self.folder / "half"
        if (folder / "config.json").exists() or not self.dense.has_checkpoint:
            return  # what starts from it says so, before anything runs
        model = load_model(str(self.dense.folder / "checkpoints" / "last.ckpt"))
        lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
        blocks = max(lists, key=len)
        del blocks[len(blocks) // 2 :]
        model.config.num_hidden_layers = len(blocks)
        model.save_pretrained(folder)


@dataclass(frozen=True)
class File:
    """A file of a row: its score on the development set, and how far its predictions agree with its model's.

    Attributes:
        agreement: Share of equal classes, or the correlation of values.
        minutes: To make the model, beyond the dense one.
    """

    task: str
    row: str
    int8: bool
    score: float
    loss: float
    agreement: float
    megabytes: float
    minutes: float

    @property
    def name(self) -> str:
        """Of the row and its precision."""
        return f"{self.row}, int8" if self.int8 else self.row


Times = dict[tuple[str, int, int], float]
"""Milliseconds of a call, by the name of a file, batch and length."""


def find(task: Task, row: Row, int8: bool) -> File | None:
    """A file that is there."""
    run = task.file(row, int8)
    report, made = run.report, task.model(row).report
    if report is None or made is None:
        return None
    scores = report["export_scores"]
    return File(
        task=task.name,
        row=row.name,
        int8=int8,
        score=scores["after"]["score"],
        loss=scores["after"]["loss"],
        agreement=scores.get("agreement", scores.get("correlation")),
        megabytes=(run.folder / "model.onnx").stat().st_size / 1e6,
        minutes=0.0 if row.name == "dense" else made["seconds"] / 60,
    )


def times(path: Path, rows: Iterable[Row]) -> Times:
    """What the benchmark has found; empty before it is done."""
    if not (path / "benchmark.json").exists():
        return {}
    told = json.loads((path / "benchmark.json").read_text(encoding="utf-8"))
    names = {label: row.name for label, row in zip(told["circumstances"]["models"], rows, strict=True)}
    found: Times = {}
    for one in told["models"]:
        name = names[one["model"]] + (", int8" if one["engine"] == "onnxruntime-int8" else "")
        found[name, one["batch_size"], one["length"]] = 1000 * float(one["seconds"])
    return found


def by_name(files: Iterable[File]) -> dict[str, dict[str, File]]:
    """Files of one name by task."""
    found: dict[str, dict[str, File]] = {}
    for file in files:
        found.setdefault(file.name, {})[file.task] = file
    return found


def share_of_dense(own: dict[str, File], dense: dict[str, File]) -> float | None:
    """Mean over tasks of score over dense score; `None` where a task is missing."""
    if own.keys() != dense.keys():
        return None
    return statistics.mean(own[task].score / dense[task].score for task in dense)


def table(files: list[File], milliseconds: Times) -> list[str]:
    """A line per row and precision: means over tasks."""
    found = by_name(files)
    dense = found.get("dense", {})
    shapes = [f"{batch} x {length}" for batch, length in SIZES]
    lines = header("model", "MB", *dense, "share of dense", "agreement", "minutes", *(f"ms, {s}" for s in shapes))
    for name, own in found.items():
        share = share_of_dense(own, dense)
        lines.append(
            line(
                name,
                f"{statistics.mean(file.megabytes for file in own.values()):.1f}",
                *(f"{own[task].score:.3f} ({own[task].loss:.3f})" if task in own else "" for task in dense),
                "" if share is None else f"{share:.1%}",
                f"{statistics.mean(file.agreement for file in own.values()):.3f}",
                f"{statistics.mean(file.minutes for file in own.values()):.1f}",
                *("" if (time := milliseconds.get((name, *size))) is None else f"{time:.1f}" for size in SIZES),
            )
        )
    return lines


def draw(files: list[File], milliseconds: Times, folder: Path) -> None:
    """Share of the dense score over megabytes, and over the time of the largest size."""
    found = by_name(files)
    batch, length = SIZES[-1]
    sizes = {name: statistics.mean(file.megabytes for file in own.values()) for name, own in found.items()}
    largest = {name: milliseconds[key] for name in found if (key := (name, batch, length)) in milliseconds}
    for kind, places, label in (
        ("size", sizes, "megabytes of the file"),
        ("time", largest, f"milliseconds of a call, {batch} x {length}"),
    ):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for name, place in places.items():
            share = share_of_dense(found[name], found.get("dense", {}))
            if share is not None:
                axes.plot(place, share, "s" if name.endswith("int8") else "o", label=name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel=label, ylabel="mean share of the dense score")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside right upper", fontsize="x-small")
        figure.savefig(folder / f"alternatives_{kind}.png", dpi=120)


def main() -> None:
    """Does what is missing and writes the tables of what is there."""
    names = [row.name for row in ROWS]
    options = parser(
        __doc__,
        *TRAINING,
        glue="glue",
        output=Path("logs/alternatives"),
        tasks=["MRPC", "STS-B", "SST-2", "configs/data/docstrings.yaml"],
    )
    options.add_argument("--rows", nargs="+", choices=names, default=names, help="alternatives; default: all")
    options.add_argument("--accelerator", default="cpu", help="what Lightning takes: cpu, cuda")
    options.add_argument("--table", action="store_true", help="run nothing, write what is there")
    options.add_argument("--workers", type=int, default=1, help="runs at a time, in processes")
    options.add_argument("--benchmark", action="store_true", help="measure times, too, when all files are there")
    arguments = read(options)
    rows = [row for row in ROWS if row.name in {"dense", *arguments.rows}]
    tasks = [Task(arguments, task) for task in arguments.tasks]
    failed: list[Run] = []
    if not arguments.table:
        failed += run_all([task.dense for task in tasks], arguments.workers, arguments.threads)
        for task in tasks:
            task.halve()
        files = [task.file(row, int8) for row in rows for task in tasks for int8 in (False, True)]
        failed += run_all(files, arguments.workers, arguments.threads)
    timed = arguments.output / "benchmark"
    if arguments.benchmark and not failed and not (timed / "benchmark.json").exists():
        models = [str(tasks[0].checkpoint(row)) for row in rows]
        words = ("benchmark", "--models", *models, "--output", str(timed), "--layers", "false")
        sizes = {"batch_sizes": {b for b, _ in SIZES}, "lengths": {length for _, length in SIZES}}
        told = [word for name, values in sizes.items() for word in (f"--{name}", *map(str, sorted(values)))]
        engines = ("--engines", "onnxruntime", "onnxruntime-int8")
        failed += run_all([Run(timed, (*words, *told, *engines))], 1, arguments.threads)
    every = [find(task, row, int8) for row in rows for int8 in (False, True) for task in tasks]
    found = [file for file in every if file is not None]
    milliseconds = times(timed, rows)
    lines = table(found, milliseconds)
    write(arguments.output, "alternatives", lines, [vars(file) for file in found])
    draw(found, milliseconds, arguments.output)
    print("\n".join(lines))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
