"""How studies write what they found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Report = dict[str, Any]
_UNSHOWN = ("score", "score_at_budget", "collapsed")


def describe(report: Report, digits: int = 3) -> str:
    """Scores of a report in a cell: every metric, the loss, and a warning of collapse."""
    metrics = {name: value for name, value in report["metrics"].items() if name not in _UNSHOWN}
    cell = " ".join(f"{name} {value:.{digits}f}" for name, value in metrics.items() if value is not None)
    return cell + (" (one class)" if report["metrics"].get("collapsed") else "")


def header(*names: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [line(*names), "|" + "---|" * len(names)]


def line(*cells: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def write(folder: Path, name: str, lines: list[str], figures: Any) -> None:
    """Writes `<name>.md` and `<name>.json` into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
