"""What a benchmark leaves, already while it runs, and how a stopped one is taken up again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowrank_pl.benchmark.figure import benchmark_figure
from lowrank_pl.benchmark.layers import Workload, latency_table
from lowrank_pl.benchmark.results import Results
from lowrank_pl.errors.run import BenchmarkResumeError
from lowrank_pl.files import OutputFolder, replace_text
from lowrank_pl.files.atomic import errors_told

NAME = "benchmark.json"
_FREE = {"command"}  # circumstances that times do not depend on


def output_folder(path: str) -> OutputFolder:
    """Where a benchmark writes; what a stopped one has left there is not lost on the user."""
    folder = OutputFolder(path)
    stopped = (folder.path / NAME).is_file()
    hint = "Give another --output, or go on with what a stopped run has left there by --resume true."
    return OutputFolder(path, remedy=hint) if stopped else folder


def save_numbers(folder: Path, results: Results) -> None:
    """Writes `benchmark.json`, after every few measurements: a kill then loses no more than those.

    Raises:
        OutputNotWritableError: the disk is full, for instance.
    """
    with errors_told(folder):
        replace_text(folder / NAME, json.dumps(results.to_dict(), indent=1) + "\n")


def save_all(folder: Path, results: Results, work: Workload) -> None:
    """Writes `benchmark.json`, the same for people, and, where all layers have been timed, `latency.json`.

    Raises:
        OutputNotWritableError: the disk is full, for instance.
    """
    save_numbers(folder, results)
    with errors_told(folder):
        replace_text(folder / "benchmark.md", results.to_markdown())
        if results.measurements or results.layers:
            benchmark_figure(results).savefig(folder / "benchmark.png", dpi=130)
        if results.layers and results.complete:
            replace_text(folder / "latency.json", json.dumps(latency_table(results.layers, work), indent=1) + "\n")


def read_stopped(folder: Path) -> Results:
    """What a stopped run has measured.

    Raises:
        BenchmarkResumeError: there is no such run.
    """
    try:
        return Results.from_dict(json.loads((folder / NAME).read_text(encoding="utf-8")))
    except OSError as error:
        raise BenchmarkResumeError(str(folder), f"it has no readable {NAME} ({error})") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BenchmarkResumeError(str(folder), f"{NAME} is damaged ({type(error).__name__}: {error})") from error


def check_continues(folder: Path, before: Results, now: Results) -> None:
    """Raises an error for putting times beside those that were taken of other models or in other circumstances.

    Args:
        folder: For the message.
        before: What was read.
        now: The same circumstances, parameters and memory of this run.

    Raises:
        BenchmarkResumeError: what differs.
    """
    first: dict[str, Any]
    for what, first, second in (
        ("", before.circumstances, now.circumstances),
        ("parameters of ", before.parameters, now.parameters),
        ("bytes of ", before.weight_bytes, now.weight_bytes),
    ):
        for name in dict.fromkeys([*first, *second]):
            # As text, so that the order of models counts: the first is what the others are compared with.
            if name not in _FREE and json.dumps(first.get(name)) != json.dumps(second.get(name)):
                difference = f"{what}{name} was {first.get(name)!r} there and is {second.get(name)!r} now"
                raise BenchmarkResumeError(str(folder), difference)
