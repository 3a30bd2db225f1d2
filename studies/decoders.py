r"""Perplexity of a decoder, factorised by every method at several keep_ratios, without tuning: one table.

    python studies/decoders.py --model smollm2 --train valid.txt --test test.txt --samples 128 \
        --methods "whitening" "whitening, sequential" "KroneckerSVD sequential" --ratios 0.9 0.8 0.6 0.5

Every cell is a run of `python -m lowrank_pl compress` with its own report.json, so a stopped study goes on where it
was, and a method that works block by block in the middle of its model. Calibration takes --samples windows of --train;
--windows of --test are scored, 0 for all. `studies/smollm2.py` makes a model small enough for a CPU. Writes
decoders.md, decoders.json and decoders.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from methods import DECODERS, STRATEGY
from options import parser, read
from runs import Run, run_all
from tables import Report, header, line, write

RECIPE = ("--config", "configs/recipes/causal_lm_kronecker.yaml")


@dataclass(frozen=True)
class Cell:
    """One method at one keep_ratio, and its run."""

    method: str
    ratio: str
    run: Run


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """Those that are asked for, the first ratio of all methods first."""
    found = []
    for ratio in arguments.ratios:
        for method in arguments.methods:
            folder = arguments.output / f"{method}-{ratio}".replace(" ", "-").replace(",", "")
            found.append(Cell(method, ratio, Run(folder, words(arguments, method, ratio, folder))))
    return found


def words(arguments: argparse.Namespace, method: str, ratio: str, folder: Path) -> tuple[str, ...]:
    """The command line of one run."""
    calibration = f"{STRATEGY}.init_args.calibration"
    data = {"train": arguments.train, "validation": arguments.test, "window": arguments.window}
    data["eval_batch_size"] = 1 if arguments.windows else arguments.batch_size
    needs_data = method != "SVD"
    return (
        "compress",
        *RECIPE,
        f"--model.init_args.pretrained={arguments.model}",
        *(f"--data.init_args.{name}={value}" for name, value in data.items()),
        f"--trainer.accelerator={arguments.accelerator}",
        "--trainer.enable_progress_bar=false",
        f"--trainer.logger.init_args.save_dir={arguments.output / 'logs'}",
        *([f"--trainer.limit_val_batches={arguments.windows}"] if arguments.windows else []),
        *DECODERS[method],
        f"{STRATEGY}.init_args.keep_ratio={ratio}",
        *([f"{calibration}.max_samples={arguments.samples}"] if needs_data else []),
        *([f"{calibration}.batch_size={arguments.batch_size}"] if needs_data else []),
        *([f"{calibration}.max_memory={arguments.max_memory}"] if needs_data and arguments.max_memory else []),
        f"--output={folder}",
    )


def table(found: list[tuple[Cell, Report]]) -> list[str]:
    """A line per method and ratio: perplexity, its multiple of the dense one, parameters kept, minutes."""
    lines = header("keep_ratio", "method", "perplexity", "times dense", "kept", "minutes")
    if found:
        lines.append(line("", "dense", f"{found[0][1]['score_dense']:.2f}", "1.00", "1.000", ""))
    for cell, report in found:
        times = number(report["score"] / report["score_dense"])
        kept, minutes = f"{report['keep_ratio']:.3f}", f"{report['seconds'] / 60:.0f}"
        lines.append(line(cell.ratio, cell.method, number(report["score"]), times, kept, minutes))
    return lines


def number(perplexity: float) -> str:
    """With two decimals as long as they mean something."""
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:.2e}"


def figures(found: Iterable[tuple[Cell, Report]]) -> Iterable[dict[str, Any]]:
    """One entry per run."""
    for cell, report in found:
        told = {key: report[key] for key in ("score", "score_dense", "keep_ratio", "seconds", "metrics")}
        yield {"method": cell.method, "ratio": cell.ratio, **told}


def draw(found: list[tuple[Cell, Report]], path: Path) -> None:
    """Perplexity over keep_ratio, a line per method; what is a hundred times the dense one or more is cut off."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    for method in dict.fromkeys(cell.method for cell, _ in found):
        points = sorted((report["keep_ratio"], report["score"]) for cell, report in found if cell.method == method)
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    if found:
        dense = found[0][1]["score_dense"]
        axes.axhline(dense, color="black", linewidth=0.8)
        axes.set_ylim(0.8 * dense, min(100 * dense, 1.3 * max(report["score"] for _, report in found)))
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axes.set(xlabel="keep_ratio", ylabel="perplexity")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Does the runs that are missing and writes the table of those that are there."""
    options = parser(__doc__, methods=DECODERS, ratios=["0.9", "0.8", "0.6", "0.5"], output=Path("logs/decoders"))
    options.add_argument("--model", required=True, help="folder or hub id of a decoder")
    options.add_argument("--train", required=True, help="text to calibrate on")
    options.add_argument("--test", required=True, help="text to score")
    options.add_argument("--window", type=int, default=512, help="tokens shown at once")
    options.add_argument("--windows", type=int, default=0, help="windows of --test that are scored; 0: all")
    options.add_argument("--samples", type=int, default=128, help="windows of --train for calibration")
    options.add_argument("--batch_size", type=int, default=4, help="windows at a time")
    options.add_argument("--max_memory", type=float, help="GiB that measured moments may take; default: no bound")
    options.add_argument("--accelerator", default="cpu", help="what Lightning takes: cpu, cuda")
    options.add_argument("--table", action="store_true", help="run nothing, write what is there")
    arguments = read(options)
    wanted = cells(arguments)
    failed = [] if arguments.table else run_all([cell.run for cell in wanted], 1, arguments.threads)
    found = [(cell, report) for cell in wanted if (report := cell.run.report) is not None]
    lines = table(found)
    write(arguments.output, "decoders", lines, list(figures(found)))
    draw(found, arguments.output / "decoders.png")
    print("\n".join(lines))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
