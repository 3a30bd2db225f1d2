"""What lies beside a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from lowrank_pl.monitoring.earlier_run import report_of_step, reports_in


def write(folder: Path, name: str, step: int, score: float) -> None:
    report = {"verb": "fit", "score": score, "score_step": step, "metrics": {"score": score, "loss": None}}
    (folder / name).write_text(json.dumps(report))


def test_the_newest_report_has_the_highest_number(tmp_path: Path) -> None:
    for name in ("report.json", "report-2.json", "report-10.json", "report-draft.json"):
        write(tmp_path, name, 5, 0.5)
    assert [place.name for place in reports_in(tmp_path)] == ["report-10.json", "report-2.json", "report.json"]


def test_scores_are_those_of_the_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    write(tmp_path, "report.json", 5, 0.5)
    write(tmp_path, "report-1.json", 9, 0.9)
    assert report_of_step(checkpoint, 5) == (tmp_path / "report.json", {"score": 0.5})
    assert report_of_step(checkpoint, 9) == (tmp_path / "report-1.json", {"score": 0.9})
    assert report_of_step(checkpoint, 7) is None
