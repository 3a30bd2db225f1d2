"""What the run that wrote a checkpoint has left beside it."""

from __future__ import annotations

from pathlib import Path


def folders_of(checkpoint: Path) -> tuple[Path, Path]:
    """Where the files of a checkpoint's run may lie: beside it, and where the folder of checkpoints is."""
    return checkpoint.parent, checkpoint.parent.parent


def reports_in(folder: Path) -> list[Path]:
    """The reports that `write_report` has put into a folder, the newest first: later ones have higher numbers."""
    numbers = {place: place.stem.removeprefix("report-") for place in folder.glob("report-*.json")}
    numbered = [place for place, number in numbers.items() if number.isdigit()]
    numbered.sort(key=lambda place: -int(numbers[place]))
    return [place for place in (*numbered, folder / "report.json") if place.is_file()]
