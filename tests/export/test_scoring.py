"""Scores of exported files: those of `validate`, numbers by hand, and what a drop does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_pl.checkpoint import SavedModel
from lowrank_pl.data import TextFiles
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.checkpoint import CheckpointMismatchError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import ScoreDropError
from lowrank_pl.export import export
from lowrank_pl.export import scoring as scoring_module
from lowrank_pl.export.scoring import Run, Scoring, in_onnxruntime, score_lines
from lowrank_pl.surgery import ModelLayout
from tests.export.test_export import checkpoint
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import VOCAB, save_tiny_model, tiny_config

WORDS = ("good", "bad", "film", "plot", "great", "awful")


class Told(SyntheticData):
    """With what reports ask of a datamodule."""

    fingerprint = "f00"

    def split(self, name: str) -> Any:
        class Rows:
            num_rows = len(self.validation)

        return Rows


def scoring(kind: Any, max_samples: int | None = None) -> Scoring:
    data = Told(kind, size=40)
    saved = SavedModel("m", tiny_config("bert"), ModelLayout({}), {}, data.target)
    return Scoring(saved, lambda _: data, "words", max_samples)  # type: ignore[arg-type,return-value]


class Predicting:
    """Predicts the labels of the data, but for the samples whose turn is among the wrong ones."""

    def __init__(self, data: Told, wrong: set[int]) -> None:
        self._labels = [sample["labels"] for sample in data.validation]
        self._wrong, self._turn = wrong, 0

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        turns = range(self._turn, self._turn + len(inputs["input_ids"]))
        self._turn += len(turns)
        classes = torch.stack([self._labels[turn] ^ (turn in self._wrong) for turn in turns])
        return F.one_hot(classes, 2).float()


def data_files(folder: Path) -> dict[str, str]:
    folder.mkdir()
    for split in ("train", "validation"):
        rows = [f"{a} {b},{'good' if i % 2 else 'bad'}" for i, a in enumerate(WORDS) for b in WORDS]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return {split: str(folder / f"{split}.csv") for split in ("train", "validation")}


def test_classes_by_hand() -> None:
    data = Told(size=40)
    found = scoring("classification").compare(Predicting(data, {3}), Predicting(data, {3, 5, 8}))
    assert found["before"]["accuracy"] == pytest.approx(19 / 20)
    assert found["after"]["accuracy"] == pytest.approx(17 / 20)
    assert found["agreement"] == pytest.approx(18 / 20)
    assert found["metric"] == "f1"  # not the accuracy: the target names it
    assert found["drop"] == pytest.approx(found["before"]["f1"] - found["after"]["f1"])
    assert found["before"]["score"] == found["before"]["f1"]
    assert (found["samples"], found["split"], found["fingerprint"]) == (20, "validation", "f00")
    text = "\n".join(score_lines(found))
    assert "| accuracy | 0.9500 | 0.8500 |" in text
    assert "predictions: 90.00% are the same" in text


def test_a_drop_up_to_max_drop_is_allowed_and_a_gain_always() -> None:
    data = Told(size=40)
    scores = scoring("classification")

    def right() -> Run:
        return Predicting(data, set())

    def wrong() -> Run:
        return Predicting(data, {1, 2})

    drop = scores.compare(right(), wrong())["drop"]
    assert scores.compare(right(), wrong(), max_drop=drop)["max_drop"] == drop
    assert scores.compare(wrong(), right(), max_drop=0)["drop"] == pytest.approx(-drop)
    with pytest.raises(ScoreDropError, match=r"f1, 20 samples.*allowed is max_drop=0"):
        scores.compare(right(), wrong(), max_drop=0)


def test_values_by_hand() -> None:
    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return inputs["input_ids"][:, 1:2] / 100

    found = scoring("regression").compare(run, lambda inputs: 2 * run(inputs) + 0.5)
    assert found["correlation"] == pytest.approx(1)
    values = torch.stack([sample["input_ids"][1] for sample in Told("regression", size=40).validation]) / 100
    assert found["mean_distance"] == pytest.approx(float((values + 0.5).mean()), rel=1e-5)
    assert found["drop"] == pytest.approx(0, abs=1e-6)  # correlations do not see it, the loss does
    assert found["after"]["loss"] > found["before"]["loss"]
    assert "correlation 1.0000, mean distance" in "\n".join(score_lines(found))


def test_scores_that_are_not_defined_are_not_called_better() -> None:
    """As the correlation of a file that puts out one value."""

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return inputs["input_ids"][:, 1:2] / 100

    found = scoring("regression").compare(run, lambda inputs: torch.full((len(inputs["input_ids"]), 1), 0.5))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["before"]["pearson"], found["after"]["pearson"]) == (pytest.approx(1), None)
    assert found["drop"] is None
    text = "\n".join(score_lines(found))
    assert "| pearson | 1.0000 | n/a |" in text
    assert "the scores cannot be compared" in text


def test_a_higher_perplexity_is_a_drop_and_unlabelled_tokens_do_not_count() -> None:
    def run(sharpness: float) -> Run:
        def logits(inputs: Mapping[str, Tensor]) -> Tensor:
            return sharpness * F.one_hot(inputs["input_ids"], 200).float()

        return logits

    found = scoring("masked_lm").compare(run(9), run(3))
    assert found["drop"] == pytest.approx(found["after"]["perplexity"] - found["before"]["perplexity"])
    assert found["drop"] > 0
    assert found["agreement"] == 1
    with pytest.raises(ScoreDropError):
        scoring("masked_lm").compare(run(9), run(3), max_drop=0.1)


def test_the_first_token_of_a_window_that_nothing_predicts_is_no_equal_prediction() -> None:
    def always(token: int) -> Run:
        return lambda inputs: F.one_hot(torch.full_like(inputs["input_ids"], token), len(VOCAB)).float()

    assert scoring("causal_lm").compare(always(5), always(6))["agreement"] == 0


def test_as_many_samples_as_asked_for_are_scored() -> None:
    data = Told(size=40)
    found = scoring("classification", max_samples=11).compare(Predicting(data, {0}), Predicting(data, {15}))
    assert found["samples"] == 11
    assert found["before"]["accuracy"] == pytest.approx(10 / 11)
    assert found["after"]["accuracy"] == 1


@pytest.mark.parametrize("format", ["factorised", "dense", "onnx"])
def test_the_scores_of_a_file_are_those_of_validate(format: Any, tmp_path: Path) -> None:
    pretrained = str(save_tiny_model("bert", tmp_path / "pretrained", layers=1))
    checkpoint(pretrained, tmp_path / "model.ckpt")
    files = data_files(tmp_path / "data")
    if format == "dense":
        Path(files["train"]).unlink()  # the model tells the classes, and nothing else is read of it
    out = export(
        str(tmp_path / "model.ckpt"),
        str(tmp_path / "out"),
        format=format,
        data=lambda words: TextFiles(words, metrics=("f1", "accuracy"), **files),  # type: ignore[arg-type]
        max_drop=0.05,
        quantize="int8" if format == "onnx" else None,
    )
    found = json.loads((out / "report.json").read_text())["export_scores"]
    task = make_task(pretrained, init_from=str(tmp_path / "model.ckpt"))
    data = TextFiles(pretrained, metrics=("f1", "accuracy"), **files)  # type: ignore[arg-type]
    (expected,) = make_trainer(tmp_path).validate(task, data, verbose=False)
    for name in ("loss", "accuracy", "f1", "score"):
        assert found["before"][name] == pytest.approx(expected[f"val/{name}"], abs=1e-6)
        if format != "onnx":
            assert found["after"][name] == pytest.approx(expected[f"val/{name}"], abs=1e-5)
    assert found["agreement"] == 1 or format == "onnx"
    assert (found["after"]["loss"] != found["before"]["loss"]) == (format == "onnx")
    for name in ("README.md", "report.md"):
        assert f"| accuracy | {found['before']['accuracy']:.4f} |" in (out / name).read_text()


class Session:
    """Notes what onnxruntime would be given."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in ("input_ids", "attention_mask", "token_type_ids")]

    def run(self, _: object, inputs: dict[str, Any]) -> list[Any]:
        self.given = inputs
        return [inputs["input_ids"]]


def test_a_file_gets_what_a_model_takes_where_data_have_no_mask_or_token_types(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = Session()
    monkeypatch.setattr(scoring_module, "open_session", lambda _: session)
    ids = torch.tensor([[7, 8], [9, 7]])
    run = in_onnxruntime(Path("model.onnx"))
    run({"input_ids": ids})  # as full windows of a corpus come
    told = {name: array.tolist() for name, array in session.given.items()}
    assert told == {"input_ids": ids.tolist(), "attention_mask": [[1, 1]] * 2, "token_type_ids": [[0, 0]] * 2}
    run({"input_ids": ids, "attention_mask": torch.tensor([[1, 0], [1, 1]])})
    assert session.given["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_a_drop_and_data_of_another_task_leave_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained = str(save_tiny_model("bert", tmp_path / "pretrained", layers=1))
    checkpoint(pretrained, tmp_path / "model.ckpt")
    files: dict[str, Any] = dict(data_files(tmp_path / "data"))
    source, out = str(tmp_path / "model.ckpt"), tmp_path / "out"
    turned = ["good", "bad"]
    with pytest.raises(CheckpointMismatchError, match="in the order"):
        export(source, str(out), data=lambda words: TextFiles(words, label_names=turned, **files))
    good = torch.tensor([VOCAB[word] for word in WORDS[1::2]])  # as the first words of the texts are labelled

    def run(model: Any) -> Run:
        written = getattr(model, "is_written", False)
        return lambda inputs: F.one_hot(torch.isin(inputs["input_ids"][:, 1], good).long() * (not written), 2).float()

    def read_back(folder: Path, saved: SavedModel) -> Any:
        model = torch.nn.Identity()
        model.is_written = True  # type: ignore[assignment]
        return model

    monkeypatch.setattr("lowrank_pl.export.folder.as_written", read_back)
    monkeypatch.setattr("lowrank_pl.export.folder.in_torch", run)
    with pytest.raises(ScoreDropError, match=r"scores 0\.5000 and the model 1\.0000 .*allowed is max_drop=0\.4"):
        export(source, str(out), data=lambda words: TextFiles(words, **files), max_drop=0.4)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_drop": 0.1}, MissingArgumentError, "max_drop is measured on.*--data"),
        ({"max_samples": 5}, MissingArgumentError, "max_samples is measured on"),
        ({"max_drop": -0.1, "data": TextFiles}, RangeError, "max_drop=-0.1"),
        ({"max_drop": float("nan"), "data": TextFiles}, RangeError, "max_drop=nan"),
        ({"max_samples": 0, "data": TextFiles}, RangeError, "max_samples=0"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_read(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export("no.ckpt", str(tmp_path / "out"), **options)
