"""What the run that wrote a checkpoint has left beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
    for place in _reports(checkpoint):
        try:
            report: Any = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(report, dict) or report.get("verb") != "fit" or report.get("score") is None:
            continue
        if report.get("score_step", report.get("steps")) == step:
            return place, {name: value for name, value in report.get("metrics", {}).items() if value is not None}
    return None


def _reports(checkpoint: Path) -> Iterator[Path]:
    for folder in folders_of(checkpoint):
        yield from sorted(folder.glob("report*.json"), key=lambda place: place.stat().st_mtime, reverse=True)
