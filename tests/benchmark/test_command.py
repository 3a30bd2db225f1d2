"""The verb as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForMultipleChoice, BertModel

from lowrank_pl.allocation import Latency
from lowrank_pl.benchmark import benchmark
from lowrank_pl.benchmark.request import labels
from lowrank_pl.cli import main
from lowrank_pl.core import LinearShape
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.outputs import OutputExistsError
from lowrank_pl.errors.run import NotOfTextsAloneError
from tests.export.test_export import checkpoint
from tests.support.tiny import tiny_config


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
        ({"models": ["x", "x/"]}, MissingArgumentError, "twice"),
        ({"engines": []}, MissingArgumentError, "--engines"),
        ({"engines": ["eager", "eager"]}, MissingArgumentError, "twice"),
        ({"batch_sizes": [8, 8]}, RangeError, "each once"),
        ({"device": "gpu"}, MissingArgumentError, "'gpu'"),
        ({"batch_sizes": [0]}, RangeError, "batch_sizes=0"),
        ({"lengths": []}, MissingArgumentError, "--lengths"),
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
    monkeypatch.setattr("lowrank_pl.benchmark.command.timed_in_turn", lambda *_: pytest.fail("something was timed"))
    with pytest.raises(error, match=word):
        benchmark(**{"models": [tiny_bert], "output": str(tmp_path / "out"), **changed})
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_head_is_refused_where_onnxruntime_is_asked_for(tmp_path: Path) -> None:
    config = tiny_config("bert")
    BertModel(config).save_pretrained(tmp_path / "headless")
    with pytest.raises(MissingArgumentError, match="without a head"):
        benchmark([str(tmp_path / "headless")], str(tmp_path / "out"), [1], [4], engines=["eager", "onnxruntime"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "head"), [("bert", AutoModelForMultipleChoice), ("vit", AutoModel)])
def test_a_model_that_needs_more_than_texts_is_told_in_a_sentence(family: str, head: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    head.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(tmp_path / "model")
    with pytest.raises(NotOfTextsAloneError, match=r"--models names a (BertForMultipleChoice|ViTModel), which"):
        benchmark([str(tmp_path / "model")], str(tmp_path / "out"), [1], [4])
    assert not (tmp_path / "out").exists()


def test_half_precision(tiny_bert: str, tmp_path: Path) -> None:
    benchmark([tiny_bert], str(tmp_path / "out"), [1], [4], dtype="bfloat16", rounds=1, seconds=0.001)
    assert json.loads((tmp_path / "out" / "latency.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_an_output_folder_with_content_is_left_alone(tiny_bert: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputExistsError):
        benchmark([tiny_bert], str(tmp_path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/a/b/model"], ["model"]),
        (["/a/one/last.ckpt", "/a/two/last.ckpt"], ["one", "two"]),
        (["/a/one", "/b/c/one"], ["a", "b/c"]),
        (["/a/one", "/a/one/deep"], ["/a/one", "deep"]),
        (["org/model", "out"], ["org/model", "out"]),
        (["a/b", "b"], ["a", "b"]),
        (["."], ["."]),
    ],
)
def test_labels_are_what_paths_do_not_share(paths: list[str], expected: list[str]) -> None:
    assert labels(paths) == dict(zip(expected, paths, strict=True))
