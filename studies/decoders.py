r"""Perplexity of a decoder, factorised by every method at several keep_ratios, untuned and tuned: one table.

    python studies/decoders.py --model smollm2 --train valid.txt --test test.txt --samples 128 \
        --methods "whitening" "whitening, sequential" "KroneckerSVD sequential" --ratios 0.9 0.8 0.6 0.5

Every cell is a run of `python -m lowrank_pl compress` with its own report.json, so a stopped study goes on where it
was, and a method that works block by block in the middle of its model. Calibration takes --samples windows of --train;
--windows of --test are scored, 0 for all. With --whole all of them are scored once more, in runs of their own, in the
precision that it names and at each of --lengths: bf16-mixed takes half the time where a processor has it. With --steps
every model, and the dense one, is tuned on so many windows of --train, one at a time, and scored once more. Checkpoints
stay where another run starts from them. `studies/smollm2.py` makes a model small enough for a CPU. Writes decoders.md,
decoders.json and decoders.png.
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
    """One method at one keep_ratio, and its runs.

    Attributes:
        method: Key of `DECODERS`.
        ratio: As it is asked for.
        run: The one that factorises; of the dense model, none.
        whole: Those that score the whole text, one per length.
        tuned: The one that tunes what `run` has made, if it is asked for.
        tuned_whole: Those that score the whole text after it.
    """

    method: str
    ratio: str
    run: Run | None
    whole: tuple[Run, ...]
    tuned: Run | None
    tuned_whole: tuple[Run, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """All of them."""
        return tuple(run for run in (self.run, *self.whole, self.tuned, *self.tuned_whole) if run is not None)


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """Those that are asked for, the first ratio of all methods first."""
    found = []
    for ratio in arguments.ratios:
        for method in arguments.methods:
            folder = arguments.output / f"{method}-{ratio}".replace(" ", "-").replace(",", "")
            keep = bool(arguments.whole or arguments.steps)
            run = Run(folder, words(arguments, method, ratio, folder), keep=keep)
            found.append(follow(arguments, method, ratio, folder.name, run))
    return found


def follow(arguments: argparse.Namespace, method: str, ratio: str, name: str, run: Run | None) -> Cell:
    """A cell with all that follows from its first run; without that, of the dense model."""
    start = None if run is None else run.folder / "model.ckpt"
    tuned_name = f"{name}-tuned-{arguments.steps}-{arguments.lr}"
    tuned = tune(arguments, tuned_name, start, run) if arguments.steps else None
    after = None if tuned is None else tuned.folder / "checkpoints" / "last.ckpt"
    return Cell(
        method,
        ratio,
        run,
        whole(arguments, name, start, run),
        tuned,
        whole(arguments, tuned_name, after, tuned) if tuned else (),
    )


def tune(arguments: argparse.Namespace, name: str, start: Path | None, after: Run | None) -> Run:
    """The run that tunes a model on --steps windows, one at a time."""
    return Run(
        arguments.output / name,
        (
            "fit",
            *common(arguments, arguments.window),
            "--data.init_args.batch_size=1",
            f"--data.init_args.eval_batch_size={1 if arguments.windows else arguments.batch_size}",
            f"--model.init_args.init_from={start or 'null'}",
            f"{STRATEGY}=NoCompression",
            f"--model.init_args.optimizer.init_args.lr={arguments.lr}",
            f"--trainer.limit_train_batches={arguments.steps}",
            "--trainer.num_sanity_val_steps=0",
            *scored_part(arguments),
            *place(arguments, name),
        ),
        after,
        keep=bool(arguments.whole),
    )


def whole(arguments: argparse.Namespace, name: str, start: Path | None, after: Run | None) -> tuple[Run, ...]:
    """Runs that score a checkpoint, or the dense model, on the whole text at every length."""
    if arguments.whole is None:
        return ()
    return tuple(
        Run(
            arguments.output / f"{name}-whole-{length}",
            (
                "test",
                *common(arguments, length),
                f"--data.init_args.test={arguments.test}",
                f"--data.init_args.eval_batch_size={arguments.batch_size}",
                f"--model.init_args.init_from={start or 'null'}",
                f"{STRATEGY}=null",
                f"--trainer.precision={arguments.whole}",
                *place(arguments, f"{name}-whole-{length}"),
            ),
            after,
        )
        for length in arguments.lengths or [arguments.window]
    )


def scored_part(arguments: argparse.Namespace) -> tuple[str, ...]:
    """How much of the text is scored where not all of it is."""
    return (f"--trainer.limit_val_batches={arguments.windows}",) if arguments.windows else ()


def place(arguments: argparse.Namespace, name: str) -> tuple[str, ...]:
    """Where a run's reports and checkpoints go that has no --output."""
    options = {"save_dir": arguments.output, "name": name, "version": ""}
    return tuple(f"--trainer.logger.init_args.{key}={value}" for key, value in options.items())


def common(arguments: argparse.Namespace, window: int) -> tuple[str, ...]:
    """What all runs are told."""
    return (
        *RECIPE,
        f"--model.init_args.pretrained={arguments.model}",
        f"--data.init_args.train={arguments.train}",
        f"--data.init_args.validation={arguments.test}",
        f"--data.init_args.window={window}",
        f"--trainer.accelerator={arguments.accelerator}",
        "--trainer.enable_progress_bar=false",
    )


def words(arguments: argparse.Namespace, method: str, ratio: str, folder: Path) -> tuple[str, ...]:
    """The command line of one run."""
    calibration = f"{STRATEGY}.init_args.calibration"
    needs_data = method != "SVD"
    return (
        "compress",
        *common(arguments, arguments.window),
        f"--data.init_args.eval_batch_size={1 if arguments.windows else arguments.batch_size}",
        f"--trainer.logger.init_args.save_dir={arguments.output / 'logs'}",
        *scored_part(arguments),
        *DECODERS[method],
        f"{STRATEGY}.init_args.keep_ratio={ratio}",
        *([f"{calibration}.max_samples={arguments.samples}"] if needs_data else []),
        *([f"{calibration}.batch_size={arguments.batch_size}"] if needs_data else []),
        *([f"{calibration}.max_memory={arguments.max_memory}"] if needs_data and arguments.max_memory else []),
        f"--output={folder}",
    )


def table(found: list[tuple[Cell, Report]], dense: Cell, lengths: list[int]) -> list[str]:
    """A line per method and ratio: perplexity, its multiple of the dense one, parameters kept, minutes, and the rest.

    That is the perplexity of whole texts, after tuning, and of whole texts after tuning; multiples of the dense model's
    after the same.
    """
    columns = [f"whole text, {length}" for length in lengths]
    columns += [what for what in ("tuned", *(f"tuned, {column}" for column in columns)) if dense.tuned]
    lines = header("keep_ratio", "method", "perplexity", "times dense", "kept", "minutes", *columns)
    further = [run for run in (*dense.whole, dense.tuned, *dense.tuned_whole) if run]
    if found:
        cells_of_dense = [number(score(run)) if run.report else "" for run in further]
        lines.append(line("", "dense", f"{found[0][1]['score_dense']:.2f}", "1.00", "1.000", "", *cells_of_dense))
    for cell, report in found:
        kept, minutes = f"{report['keep_ratio']:.3f}", f"{report['seconds'] / 60:.0f}"
        times = number(report["score"] / report["score_dense"])
        own = [run for run in (*cell.whole, cell.tuned, *cell.tuned_whole) if run]
        rest = [relative(run, of) for run, of in zip(own, further, strict=True)]
        lines.append(line(cell.ratio, cell.method, number(report["score"]), times, kept, minutes, *rest))
    return lines


def short_of_steps(found: list[Cell], steps: int | None) -> list[str]:
    """A line on tuning that ended before all the steps that were asked for: every window is taken once."""
    taken = {cell: cell.tuned.report["steps"] for cell in found if cell.tuned and cell.tuned.report}
    fewer = [f"{cell.method} {cell.ratio} for {count}" for cell, count in taken.items() if count != steps]
    return [f"\nTuned for fewer steps, as --train has no more windows: {', '.join(fewer)}."] if fewer else []


def score(run: Run) -> float:
    """The perplexity that a finished run has found."""
    assert run.report is not None
    return float(run.report["score"])


def relative(run: Run, dense: Run) -> str:
    """A perplexity and, in brackets, its multiple of the dense one; empty where it is not there yet."""
    if run.report is None:
        return ""
    return number(score(run)) + (f" ({number(score(run) / score(dense))})" if dense.report else "")


def number(perplexity: float) -> str:
    """With two decimals as long as they mean something."""
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:.2e}"


def figures(found: Iterable[tuple[Cell, Report]]) -> Iterable[dict[str, Any]]:
    """One entry per run."""
    for cell, report in found:
        told = {key: report[key] for key in ("score", "score_dense", "keep_ratio", "seconds", "metrics")}
        further = {"whole": whole_texts(cell.whole), "tuned_whole": whole_texts(cell.tuned_whole)}
        tuned = score(cell.tuned) if cell.tuned and cell.tuned.report else None
        yield {"method": cell.method, "ratio": cell.ratio, **told, "tuned": tuned, **further}


def whole_texts(runs: tuple[Run, ...]) -> dict[int, float]:
    """Perplexities by the number of tokens shown at once."""
    return {run.report["metrics"]["window"]: score(run) for run in runs if run.report}


def points(found: list[tuple[Cell, Report]], dense: tuple[Run, ...]) -> tuple[float, list[tuple[str, float, float]]]:
    """The dense perplexity, and method, share kept and perplexity of all cells; of the whole text where all have it."""
    if dense and dense[0].report and all(cell.whole[0].report for cell, _ in found):
        return score(dense[0]), [(cell.method, told["keep_ratio"], score(cell.whole[0])) for cell, told in found]
    return found[0][1]["score_dense"], [(cell.method, told["keep_ratio"], told["score"]) for cell, told in found]


def draw(found: list[tuple[Cell, Report]], dense: tuple[Run, ...], path: Path) -> None:
    """Perplexity over keep_ratio, a line per method; what is a hundred times the dense one or more is cut off."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    if found:
        least, drawn = points(found, dense)
        for method in dict.fromkeys(name for name, _, _ in drawn):
            of_method = sorted((kept, perplexity) for name, kept, perplexity in drawn if name == method)
            axes.plot(*zip(*of_method, strict=True), marker="o", label=method)
        axes.axhline(least, color="black", linewidth=0.8)
        axes.set_ylim(0.8 * least, min(100 * least, 1.3 * max(perplexity for _, _, perplexity in drawn)))
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axes.set(xlabel="keep_ratio", ylabel="perplexity")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Does the runs that are missing and writes the table of those that are there."""
    ratios, output = ["0.9", "0.8", "0.6", "0.5"], Path("logs/decoders")
    options = parser(__doc__, methods=DECODERS, ratios=ratios, lr="1e-4", output=output)
    options.add_argument("--model", required=True, help="folder or hub id of a decoder")
    options.add_argument("--train", required=True, help="text to calibrate on")
    options.add_argument("--test", required=True, help="text to score")
    options.add_argument("--window", type=int, default=512, help="tokens shown at once")
    options.add_argument("--windows", type=int, default=0, help="windows of --test that are scored; 0: all")
    options.add_argument("--samples", type=int, default=128, help="windows of --train for calibration")
    options.add_argument("--batch_size", type=int, default=4, help="windows at a time")
    options.add_argument("--max_memory", type=float, help="GiB that measured moments may take; default: no bound")
    options.add_argument("--whole", metavar="PRECISION", help="score all of --test once more, in this precision")
    options.add_argument("--lengths", type=int, nargs="+", help="tokens shown at once by --whole; default: --window")
    options.add_argument("--steps", type=int, help="tune for so many steps of one window, at --lr; at most all")
    options.add_argument("--workers", type=int, default=1, help="runs at a time, in processes")
    options.add_argument("--accelerator", default="cpu", help="what Lightning takes: cpu, cuda")
    options.add_argument("--table", action="store_true", help="run nothing, write what is there")
    arguments = read(options)
    wanted, dense = cells(arguments), follow(arguments, "dense", "1", "dense", None)
    runs = [run for each in (*wanted, dense) for run in each.runs]
    failed = [] if arguments.table else run_all(runs, arguments.workers, arguments.threads)
    found = [(each, report) for each in wanted if each.run and (report := each.run.report) is not None]
    lines = table(found, dense, (arguments.lengths or [arguments.window]) if arguments.whole else [])
    lines += short_of_steps([*wanted, dense], arguments.steps)
    write(arguments.output, "decoders", lines, list(figures(found)))
    draw(found, dense.whole if arguments.windows else (), arguments.output / "decoders.png")
    print("\n".join(lines))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
