r"""Scores methods on tasks before tuning, after it and in one round, against dense fine-tuning: one table.

Stages, each an ordinary `python -m lowrank_pl` run with its own report.json, so that a stopped grid goes on where it
was and every number can be looked up:

    untuned    fine-tune the dense encoder, factorise it, score it as it is
    tuned      fine-tune, factorise, fine-tune again: two rounds
    one_round  the method at work from the pre-trained encoder on, for as many epochs as dense fine-tuning has
    long_round the same for as many epochs as two rounds have

What is asked for is METHOD:RATIOS or METHOD:RATIOS:SEEDS, with the names in studies/methods.py:

    python studies/grid.py --glue PATH/TO/glue --untuned "KroneckerSVD:0.33,0.1" "FWSVD both:0.33,0.1" \
        --tuned KroneckerSVD:0.1 --one_round RankDyna:0.33,0.1:0,1,2 --tasks MRPC STS-B

Writes grid.md, grid.json and grid.png. A task is one of GLUE's, or a YAML file with a `data` section. Scores are those
of the last epoch; those of dense models are in the table for every seed that anything was asked for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from methods import ROUND, STATIC, STRATEGY
from options import TRAINING, limit_of, parser, read
from runs import Run, run_all
from tables import Report, header, line, write

STAGES: dict[str, Mapping[str, list[str]]] = {
    "untuned": STATIC,
    "tuned": STATIC,
    "one_round": {**STATIC, **ROUND},
    "long_round": {**STATIC, **ROUND},
}
Row = dict[str, dict[int, tuple[Report, Report]]]
"""By task and seed: the report of a method, and that of the dense model."""
RECIPE = ("--config", "configs/recipes/glue_finetune.yaml")


@dataclass(frozen=True)
class Asked:
    """A row of the table: one method at one stage and keep_ratio."""

    stage: str
    method: str
    ratio: str
    seeds: tuple[int, ...]


class Cells:
    """The runs of one task and seed."""

    def __init__(self, arguments: argparse.Namespace, task: str, seed: int) -> None:
        self.name = Path(task).stem
        self.folder = Path(arguments.output) / f"{self.name}-{seed}"
        self._epochs = int(arguments.epochs)
        self._data = ["--config", task]
        if not task.endswith(".yaml"):
            self._data = [f"--data.init_args.task={task}", f"--data.init_args.path={arguments.glue}/{task}"]
        limit = limit_of(task, arguments)
        if limit is not None:
            self._data.append(f"--data.init_args.max_train_samples={limit}")
        self._data.append(f"--data.init_args.seed={seed}")
        self._task_words = [*self._data] if task.endswith(".yaml") else ["--data=GLUE", *self._data]
        self._data.append(f"--seed_everything={seed}")
        self._data += [f"--model.init_args.pretrained={arguments.pretrained}"]
        self._data += [f"--model.init_args.optimizer.init_args.lr={arguments.lr}"]
        self._data += [f"--trainer.accelerator={arguments.accelerator}", "--trainer.enable_progress_bar=false"]
        self.dense = self.fit("dense", [], keep=True)

    def run(self, asked: Asked) -> Run:
        """The run of one cell."""
        method = STAGES[asked.stage][asked.method]
        if asked.method != "dense":
            method = [*method, f"{STRATEGY}.init_args.keep_ratio={asked.ratio}"]
        name = f"{asked.stage}-{asked.method}-{asked.ratio}".replace(" ", "-").replace(",", "")
        start = f"--model.init_args.init_from={self.dense.folder / 'checkpoints' / 'last.ckpt'}"
        if asked.stage == "untuned":
            return self.compress(name, [*method, start])
        if asked.stage == "tuned":
            return self.fit(name, [*method, start], self.dense)
        return self.fit(name, method, epochs=self._epochs * (2 if asked.stage == "long_round" else 1))

    @property
    def data(self) -> list[str]:
        """The words that name the data alone."""
        return self._task_words

    def compress(self, name: str, method: list[str], keep: bool = False) -> Run:
        """Compresses the dense model."""
        logger = f"--trainer.logger.init_args.save_dir={self.folder / 'logs'}"
        words = ("compress", *RECIPE, *self._data, logger, *method, f"--output={self.folder / name}")
        return Run(self.folder / name, words, self.dense, keep)

    def fit(
        self, name: str, method: list[str], after: Run | None = None, keep: bool = False, epochs: int | None = None
    ) -> Run:
        """Trains, for as many epochs as the dense model unless told otherwise."""
        places = {"save_dir": self.folder, "name": name, "version": ""}
        logger = [f"--trainer.logger.init_args.{key}={value}" for key, value in places.items()]
        # A recipe of the method's own comes before the data, and any other word of the method last.
        recipe, options = (method[:2], method[2:]) if method[:1] == ["--config"] else ([], method)
        length = f"--trainer.max_epochs={epochs or self._epochs}"
        return Run(self.folder / name, ("fit", *RECIPE, *recipe, *self._data, length, *logger, *options), after, keep)


def parse(stage: str, words: Iterable[str], seeds: list[int]) -> list[Asked]:
    """`METHOD:RATIOS[:SEEDS]` of one stage."""
    asked = []
    for word in words:
        method, *rest = word.split(":")
        if method not in STAGES[stage] or not 1 <= len(rest) <= 2:
            sys.exit(
                f"--{stage} {word!r}: wanted METHOD:RATIOS or METHOD:RATIOS:SEEDS, with a method of "
                f"{', '.join(STAGES[stage])}"
            )
        chosen = tuple(int(seed) for seed in rest[1].split(",")) if rest[1:] else tuple(seeds)
        asked += [Asked(stage, method, ratio, chosen) for ratio in rest[0].split(",")]
    return asked


def table(rows: dict[Asked, Row], tasks: list[str]) -> list[str]:
    """A line per row: score (loss) of each task, means over seeds, and the mean share of the dense score.

    Args:
        rows: What was found.
        tasks: The columns.
    """
    lines = header("stage", "method", "keep_ratio", "seeds", *tasks, "mean share of dense")
    for asked, row in rows.items():
        cells = [cell([report for report, _ in row.get(task, {}).values()]) for task in tasks]
        share = share_of_dense(row, len(tasks))
        told = "" if share is None else f"{share:.1%}"
        found = sorted({len(row.get(task, {})) for task in tasks})
        lines.append(line(asked.stage, asked.method, asked.ratio, " / ".join(map(str, found)), *cells, told))
    return lines


def share_of_dense(row: Row, tasks: int) -> float | None:
    """Mean over tasks of the mean over seeds of score over dense score; `None` where a task is missing."""
    shares = [
        statistics.mean(found["score"] / dense["score"] for found, dense in each.values()) for each in row.values()
    ]
    return statistics.mean(shares) if len(shares) == tasks else None


def draw(rows: dict[Asked, Row], tasks: int, path: Path) -> None:
    """The mean share of the dense score over keep_ratio, a line per stage and method."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for asked, row in rows.items():
        share = share_of_dense(row, tasks)
        if share is not None and asked.stage:
            lines.setdefault((asked.stage, asked.method), []).append((float(asked.ratio), share))
    styles = dict(zip(STAGES, ("-", "--", ":", "-."), strict=True))
    for (stage, method), points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), styles[stage], marker="o", label=f"{method}, {stage}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="keep_ratio", ylabel="mean share of the dense score")
    axes.set_xticks(ticks := sorted({x for points in lines.values() for x, _ in points}), [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if lines:
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)


def cell(reports: list[Report]) -> str:
    """Mean score with its standard deviation over seeds and mean loss; † where a model says one class only."""
    if not reports:
        return ""
    scores = [report["score"] for report in reports]
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    loss = statistics.mean(report["metrics"]["loss"] for report in reports)
    collapsed = any(report["metrics"].get("collapsed") for report in reports)
    return f"{statistics.mean(scores):.3f}{spread} ({loss:.3f}){'†' if collapsed else ''}"


def main() -> None:
    """Does the runs that are missing and writes the table of those that are there."""
    options = parser(
        __doc__,
        *TRAINING,
        "seeds",
        glue="glue",
        output=Path("logs/grid"),
        tasks=["MRPC", "STS-B", "SST-2", "configs/data/docstrings.yaml"],
    )
    for stage in STAGES:
        options.add_argument(f"--{stage}", nargs="*", default=[], metavar="METHOD:RATIOS[:SEEDS]")
    options.add_argument("--accelerator", default="cpu", help="what Lightning takes: cpu, cuda")
    options.add_argument("--table", action="store_true", help="run nothing, write what is there")
    options.add_argument("--workers", type=int, default=1, help="runs at a time, in processes")
    arguments = read(options)
    rows = [row for stage in STAGES for row in parse(stage, getattr(arguments, stage), arguments.seeds)]
    seeds = sorted({seed for row in rows for seed in row.seeds}) or arguments.seeds
    cells = {(task, seed): Cells(arguments, task, seed) for task in arguments.tasks for seed in seeds}
    wanted = [cells[task, seed].run(row) for row in rows for seed in row.seeds for task in arguments.tasks]
    # Dense models first: most of the others wait for one.
    failed = (
        []
        if arguments.table
        else run_all([each.dense for each in cells.values()] + wanted, arguments.workers, arguments.threads)
    )
    found: dict[Asked, Row] = {}
    for row in [Asked("", "dense", "1", tuple(seeds)), *rows]:
        told = found.setdefault(row, {})
        for (_, seed), each in cells.items():
            report = (each.run(row) if row.stage else each.dense).report if seed in row.seeds else None
            dense = each.dense.report
            if report is not None and dense is not None:
                told.setdefault(each.name, {})[seed] = report, dense
    lines = table(found, [Path(task).stem for task in arguments.tasks])
    write(arguments.output, "grid", lines, list(figures(found)))
    draw(found, len(arguments.tasks), arguments.output / "grid.png")
    print("\n".join(lines))
    sys.exit(1 if failed else 0)


def figures(rows: dict[Asked, Row]) -> Iterable[dict[str, Any]]:
    """One entry per run."""
    for asked, row in rows.items():
        for task, reports in row.items():
            for seed, (report, dense) in reports.items():
                told = {"stage": asked.stage, "method": asked.method, "ratio": asked.ratio, "task": task, "seed": seed}
                yield {**told, "score": report["score"], "dense": dense["score"], "metrics": report["metrics"]}


if __name__ == "__main__":
    main()
