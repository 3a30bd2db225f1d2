"""What lies beside a checkpoint."""

from __future__ import annotations

from pathlib import Path

from lowrank_pl.monitoring.earlier_run import reports_in


def test_the_newest_report_has_the_highest_number(tmp_path: Path) -> None:
    for name in ("report.json", "report-2.json", "report-10.json", "report-draft.json"):
        (tmp_path / name).write_text("{}")
    assert [place.name for place in reports_in(tmp_path)] == ["report-10.json", "report-2.json", "report.json"]
