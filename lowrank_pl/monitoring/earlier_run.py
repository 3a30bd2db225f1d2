"""What the run that wrote a checkpoint has left beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def folders_of(checkpoint: Path) -> tuple[Path, Path]:
    """Where the files of a checkpoint's run may lie: beside it, and where the folder of checkpoints is."""
    return checkpoint.parent, checkpoint.parent.parent


def report_of_step(checkpoint: Path, step: int) -> tuple[Path, dict[str, float]] | None:
    """The report of the training that wrote a checkpoint, if its scores are those of a step.

    Returns:
        Where it lies, and its metrics without the prefix of their split, `score` among them; the newest of several.
    """
    for place in (place for folder in folders_of(checkpoint) for place in reports_in(folder)):
        try:
            report: Any = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(report, dict) or report.get("verb") != "fit" or report.get("score") is None:
            continue
        if report.get("score_step", report.get("steps")) == step:
            return place, {name: value for name, value in report.get("metrics", {}).items() if value is not None}
    return None


def reports_in(folder: Path) -> list[Path]:
    """The reports that `write_report` has put into a folder, the newest first: later ones have higher numbers."""
    numbers = {place: place.stem.removeprefix("report-") for place in folder.glob("report-*.json")}
    numbered = [place for place, number in numbers.items() if number.isdigit()]
    numbered.sort(key=lambda place: -int(numbers[place]))
    return [place for place in (*numbered, folder / "report.json") if place.is_file()]
