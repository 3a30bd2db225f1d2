"""Benchmarks and studies: each explains its options, and a grid whose runs are there only writes its table."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(
    path
    for folder in ("benchmarks", "studies")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()
)


def run(path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """As `python PATH WORDS…`, in this process."""
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    before = set(sys.modules)
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        # Modules beside a program are found by their bare names, which mean nothing to other tests.
        beside = {other.stem for other in path.parent.glob("*.py")}
        for name in beside & (set(sys.modules) - before):
            del sys.modules[name]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_explains_its_options(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(path, monkeypatch, "--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"python {path.relative_to(ROOT)}" in said
    used = re.findall(r"--(\w+)", said.split("options:")[0].split("\n\n", 1)[1])
    assert all(re.search(rf"^  --{name}\b", said, re.MULTILINE) for name in used), "an example that cannot be run"


def report(score: float) -> dict[str, Any]:
    return {
        "score": score,
        "score_dense": 0.8,
        "metrics": {"accuracy": score, "f1": None, "collapsed": score < 0.6},
        "keep_ratio": 0.5,
        "parameters": {"total": 1234},
    }


def write_report(folder: Path, score: float) -> None:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report(score)))


def test_a_static_grid_whose_runs_are_there_only_writes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "MRPC-seed3"
    write_report(runs / "dense" / "version_0", 0.8)
    write_report(runs / "compress-FWSVD-both-0.5", 0.5)
    write_report(runs / "tuned-FWSVD-both-0.5" / "version_0", 0.75)
    words = ["--tasks", "MRPC", "--seeds", "3", "--ratios", "0.5", "--methods", "FWSVD both", "--tune", "MRPC:0.5"]
    run(ROOT / "studies" / "static_grid.py", monkeypatch, "--glue", "nowhere", "--output", str(tmp_path), *words)
    assert (tmp_path / "grid.md").read_text().splitlines()[2:] == [
        "| MRPC | 3 | dense | 0.500 | 1,234 | accuracy 0.800 |  |",
        "| MRPC | 3 | FWSVD both | 0.500 | 1,234 | accuracy 0.500 (one class) | accuracy 0.750 |",
    ]
    assert json.loads((tmp_path / "grid.json").read_text())[1]["after"]["score"] == 0.75


def test_a_rankdyna_grid_uses_the_runs_of_the_static_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, score in ((0, 0.7), (1, 0.8)):
        runs = tmp_path / f"MRPC-seed{seed}"
        write_report(runs / "dense" / "version_0", 0.8)
        write_report(runs / "rankdyna-0.1-default" / "version_0", score)
        write_report(runs / "compress-SVD-0.1", 0.5)
        write_report(runs / "tuned-SVD-0.1" / "version_0", 0.75)
    words = ["--tasks", "MRPC", "--seeds", "0", "1", "--ratios", "0.1", "--methods", "SVD"]
    run(ROOT / "studies" / "rankdyna_grid.py", monkeypatch, "--glue", "nowhere", "--output", str(tmp_path), *words)
    assert (tmp_path / "rankdyna.md").read_text().splitlines()[-2:] == [
        "| MRPC | 0.1 | RankDyna default | 2 | 0.7500 ± 0.0707 |",
        "| MRPC | 0.1 | SVD | 2 | 0.7500 ± 0.0000 |",
    ]


def test_an_untuned_grid_whose_reports_are_there_only_writes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path / "MRPC-0" / "whitening-0.5", 0.7)
    words = ["--methods", "whitening", "--ratios", "0.5", "--output", str(tmp_path)]
    run(ROOT / "studies" / "untuned_grid.py", monkeypatch, "--dense", "dense/MRPC-0:MRPC", *words)
    assert (tmp_path / "untuned.md").read_text().splitlines()[2:] == [
        "| MRPC-0 | whitening | 0.5 | 0.7000 | 87.5% | accuracy 0.7000 | 0.8000 |"
    ]


def test_the_script_for_gpus_says_at_once_that_there_is_none() -> None:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    environment = {**os.environ, "PYTHON": "false"}  # an interpreter that finds no device, without loading torch
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1
    assert result.stderr == "gpu.sh: false finds no torch with a CUDA device, which everything here needs.\n"
    assert not result.stdout
