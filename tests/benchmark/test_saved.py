"""A stopped benchmark leaves what it has measured, and the next one goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_pl.benchmark import benchmark, command
from lowrank_pl.errors.outputs import OutputExistsError
from lowrank_pl.errors.run import BenchmarkResumeError
from tests.export.test_export import checkpoint

ASKED: dict[str, Any] = {"batch_sizes": [1, 2], "lengths": [4], "rounds": 2, "seconds": 0.001, "threads": 1}


def stopped(after: int, error: BaseException, name: str = "timed_in_turn") -> Callable[..., Any]:
    """What measures, until it has been called so often."""
    real, calls = getattr(command, name), []

    def measure(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise error
        return real(*args, **kwargs)

    return measure


def told(folder: Path) -> Any:
    return json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))


@pytest.fixture
def models(tiny_bert: str, tmp_path: Path) -> list[str]:
    checkpoint(tiny_bert, tmp_path / "small.ckpt")
    return [tiny_bert, str(tmp_path / "small.ckpt")]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_what_was_measured_is_kept_and_the_rest_measured_later(
    models: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(command, "timed_in_turn", stopped(1, error))
        with pytest.raises(type(error)):
            benchmark(models, str(out), **ASKED)
    assert f"what was measured so far is in {out}; the same command with --resume true" in capsys.readouterr().out
    first = told(out)
    assert first["complete"] is False
    assert [row["batch_size"] for row in first["models"]] == [1, 1]
    assert first["layers"] == []
    assert "incomplete" in (out / "benchmark.md").read_text(encoding="utf-8")
    assert not (out / "latency.json").exists()
    with pytest.raises(OutputExistsError, match="--resume true"):
        benchmark(models, str(out), **ASKED)
    with monkeypatch.context() as patch:
        patch.setattr(command, "measure_layer", stopped(1, error, "measure_layer"))
        with pytest.raises(type(error)):
            benchmark(models, str(out), **ASKED, resume=True)
    second = told(out)
    assert second["models"][:2] == first["models"]
    assert [row["batch_size"] for row in second["models"]] == [1, 1, 2, 2]
    assert len(second["layers"]) == 1
    benchmark(models, str(out), **ASKED, resume=True)
    third = told(out)
    assert third["complete"] is True
    assert third["models"] == second["models"]
    assert third["layers"][:1] == second["layers"]
    assert [(entry["out"], entry["in"]) for entry in third["layers"]] == [(32, 32), (64, 32), (32, 64)]
    assert (out / "latency.json").exists()
    assert "incomplete" not in (out / "benchmark.md").read_text(encoding="utf-8")


def test_a_kill_leaves_the_numbers(models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing after the last measurement runs then."""
    monkeypatch.setattr(command, "timed_in_turn", stopped(1, KeyboardInterrupt()))
    monkeypatch.setattr(command, "_tell_stopped", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        benchmark(models, str(tmp_path / "out"), **ASKED)
    assert [row["batch_size"] for row in told(tmp_path / "out")["models"]] == [1, 1]


def test_a_run_stopped_before_its_first_time_leaves_nothing(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "timed_in_turn", stopped(0, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        benchmark(models, str(tmp_path / "out"), **ASKED)
    assert not (tmp_path / "out").exists()


def test_other_circumstances_are_refused(models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path / "out")
    benchmark(models, out, **ASKED, layers=False)
    monkeypatch.setattr(command, "timed_in_turn", lambda *_: pytest.fail("something was timed"))
    for changed, word in (({"rounds": 3}, "rounds was 2 there and is 3"), ({"threads": 2}, "threads"), ({}, "models")):
        other = models if changed else models[::-1]
        with pytest.raises(BenchmarkResumeError, match=word):
            benchmark(other, out, **{**ASKED, **changed}, layers=False, resume=True)
    with pytest.raises(BenchmarkResumeError, match=r"no readable benchmark\.json"):
        benchmark(models, str(tmp_path / "none"), **ASKED, resume=True)
    (tmp_path / "out" / "benchmark.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BenchmarkResumeError, match="damaged"):
        benchmark(models, out, **ASKED, resume=True)
