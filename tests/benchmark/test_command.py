"""The verb as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowrank_pl.allocation import Latency
from lowrank_pl.benchmark import benchmark
from lowrank_pl.benchmark.command import _labels
from lowrank_pl.cli import main
from lowrank_pl.core import LinearShape
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import MissingArgumentError, OutputExistsError
from tests.export.test_export import checkpoint


def test_models_and_layers_from_the_command_line(
    tiny_bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tiny_bert, tmp_path / "small.ckpt")
    output = tmp_path / "times"
    words = ["benchmark", "--models", tiny_bert, str(tmp_path / "small.ckpt"), "--output", str(output)]
    words += ["--batch_sizes", "1", "2", "--lengths", "8", "--rounds", "2", "--seconds", "0.001", "--threads", "1"]
    main(words)
    told = json.loads((output / "benchmark.json").read_text(encoding="utf-8"))
    assert [(row["batch_size"], row["length"]) for row in told["models"]] == [(1, 8), (1, 8), (2, 8), (2, 8)]
    assert [row["speedup"] for row in told["models"]][::2] == [1, 1]
    assert all(row["ideal_speedup"] > 1 for row in told["models"][1::2])
    assert told["circumstances"]["threads"] == 1
    assert Latency(str(output / "latency.json")).dense(LinearShape(64, 32)) > 0
    assert (output / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert (output / "benchmark.md").read_text(encoding="utf-8") in printed
    assert f"written to {output}" in printed


def test_layers_can_be_left_out(tiny_bert: str, tmp_path: Path) -> None:
    benchmark([tiny_bert], str(tmp_path / "out"), [1], [4], rounds=1, seconds=0.001, layers=False)
    assert not (tmp_path / "out" / "latency.json").exists()
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text(encoding="utf-8"))["layers"] == []


@pytest.mark.parametrize(
    ("changed", "error", "word"),
    [
        ({"models": []}, MissingArgumentError, "--models"),
        ({"models": ["x", "x"]}, MissingArgumentError, "twice"),
        ({"batch_sizes": [0]}, RangeError, "batch_sizes=0"),
        ({"lengths": []}, RangeError, "lengths"),
        ({"rounds": 0}, RangeError, "rounds=0"),
        ({"threads": 0}, RangeError, "threads=0"),
        ({"seconds": 0.0}, RangeError, "seconds"),
        ({"lengths": [4, 4000]}, RangeError, "lengths=4000"),
        ({"device": "cuda:99"}, MissingArgumentError, "cuda:99"),
    ],
)
def test_bad_input_is_refused_before_anything_is_timed(
    tiny_bert: str, tmp_path: Path, changed: dict[str, Any], error: type[Exception], word: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("lowrank_pl.benchmark.command.timed_in_turn", lambda *_: pytest.fail("something was timed"))
    with pytest.raises(error, match=word):
        benchmark(**{"models": [tiny_bert], "output": str(tmp_path / "out"), **changed})
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_content_is_left_alone(tiny_bert: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputExistsError):
        benchmark([tiny_bert], str(tmp_path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["/a/b/model"], ["model"]),
        (["/a/one/last.ckpt", "/a/two/last.ckpt"], ["one", "two"]),
        (["/a/one", "/b/c/one"], ["a", "b/c"]),
        (["/a/one", "/a/one/deep"], ["/a/one", "deep"]),
        (["org/model", "out"], ["org/model", "out"]),
    ],
)
def test_labels_are_what_paths_do_not_share(paths: list[str], labels: list[str]) -> None:
    assert _labels(paths) == dict(zip(labels, paths, strict=True))
