"""Predictions as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_pl.contract import TargetKind
from lowrank_pl.data import CoNLL, TextFiles
from lowrank_pl.monitoring import PredictionWriter
from lowrank_pl.tasks import EncoderTask, MaskedLM, TokenClassification
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import SyntheticData


def written(folder: Path, task: EncoderTask, *batches: dict[str, Tensor]) -> list[dict[str, Any]]:
    """What is written for predictions by hand."""
    trainer = make_trainer(folder, logger=False)
    PredictionWriter().write_on_epoch_end(trainer, task, batches, [])
    return read(folder)


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def untrained(cls: type[EncoderTask], kind: TargetKind) -> EncoderTask:
    task = cls()
    task.target = SyntheticData(kind).target
    return task


def predicted(task: EncoderTask, data: SyntheticData, folder: Path) -> list[dict[str, Any]]:
    """What `predict` writes."""
    task.build(data.target)
    trainer = make_trainer(folder, callbacks=[PredictionWriter()])
    trainer.predict(task, data, return_predictions=False)
    assert trainer.log_dir is not None
    return read(Path(trainer.log_dir))


def test_predictions_by_name_in_order(tiny_bert: str, tmp_path: Path) -> None:
    data = SyntheticData()
    task = make_task(tiny_bert)
    task.build(data.target)
    trainer = make_trainer(tmp_path, callbacks=[PredictionWriter()])
    trainer.predict(task, data, return_predictions=False)
    assert trainer.log_dir is not None
    rows = [json.loads(line) for line in (Path(trainer.log_dir) / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(24))
    for row in rows:
        assert row["prediction"] == ("yes" if row["logits"][1] > row["logits"][0] else "no")
        no, yes = torch.tensor(row["logits"], dtype=torch.float64).softmax(0).tolist()
        assert row["probabilities"] == {"no": pytest.approx(no), "yes": pytest.approx(yes)}
        assert row["probability"] == row["probabilities"][row["prediction"]] >= 0.5


def test_one_tag_per_labelled_word(tmp_path: Path) -> None:
    first = {
        "prediction": torch.tensor([[0, 1, 2, 2, 0], [1, 0, 1, 0, 0]]),
        "labels": torch.tensor([[-100, 0, 2, -100, -100], [-100, 1, -100, 0, -100]]),
    }
    second = {"prediction": torch.tensor([[2, 2]]), "labels": torch.tensor([[-100, -100]])}
    rows = written(tmp_path, untrained(TokenClassification, "token_classification"), first, second)
    assert rows == [
        {"index": 0, "prediction": ["B-X", "I-X"]},
        {"index": 1, "prediction": ["O", "O"]},
        {"index": 2, "prediction": []},
    ]


def test_all_tokens_without_labels(tmp_path: Path) -> None:
    batch = {"prediction": torch.tensor([[0, 1, 2]])}
    rows = written(tmp_path, untrained(TokenClassification, "token_classification"), batch)
    assert rows == [{"index": 0, "prediction": ["O", "B-X", "I-X"]}]


def test_token_ids_of_masked_positions(tmp_path: Path) -> None:
    batch = {
        "prediction": torch.tensor([[7, 8, 9], [4, 5, 6]]),
        "labels": torch.tensor([[-100, 3, 9], [4, -100, -100]]),
    }
    rows = written(tmp_path, untrained(MaskedLM, "masked_lm"), batch)
    assert [row["prediction"] for row in rows] == [[8, 9], [4]]


@pytest.mark.parametrize(
    ("cls", "kind"), [(TokenClassification, "token_classification"), (MaskedLM, "masked_lm")], ids=["tags", "masks"]
)
def test_tokens_end_to_end(tiny_bert: str, tmp_path: Path, cls: type[EncoderTask], kind: TargetKind) -> None:
    data, task = SyntheticData(kind), cls(tiny_bert)
    rows = predicted(task, data, tmp_path)
    assert [row["index"] for row in rows] == list(range(24))
    names = data.target.label_names
    task.eval()
    for sample, row in zip(data.validation, rows, strict=True):
        with torch.no_grad():
            best = task({name: tensor[None] for name, tensor in sample.items()})[0].argmax(-1)
        ids = best[sample["labels"] != -100].tolist()
        assert row == {"index": row["index"], "prediction": [names[id_] for id_ in ids] if names else ids}


def test_labels_do_not_change_the_rows_of_whole_texts(tmp_path: Path, tiny_bert: str) -> None:
    rows = predicted(make_task(tiny_bert), SyntheticData("regression"), tmp_path)
    assert all(set(row) == {"index", "prediction"} and isinstance(row["prediction"], float) for row in rows)


def test_what_was_predicted_on_stands_beside_it(tiny_bert: str, tmp_path: Path) -> None:
    """Pairs in the order of their file, whatever the batches; words with a tag each."""
    rows = [("good film", "a plot"), ("the", "bad"), ("it was a great film of the plot", "no")]
    (tmp_path / "new.csv").write_text("a,b\n" + "".join(f"{a},{b}\n" for a, b in rows), encoding="utf-8")
    data = TextFiles(
        tiny_bert, predict=str(tmp_path / "new.csv"), text="a", text_pair="b", max_length=32, eval_batch_size=2
    )
    task = make_task(tiny_bert)
    task.build(SyntheticData().target)
    trainer = make_trainer(tmp_path, callbacks=[PredictionWriter()])
    trainer.predict(task, data, return_predictions=False)
    found = read(Path(str(trainer.log_dir)))
    assert [(row["index"], row["row"], row["text"], row["text_pair"]) for row in found] == [
        (at, at + 2, *row) for at, row in enumerate(rows)
    ]
    assert {row["prediction"] for row in found} <= {"no", "yes"}
    (tmp_path / "ner.txt").write_text("good B-X\nfilm O\n\nthe O\n", encoding="utf-8")
    ner = CoNLL(tiny_bert, str(tmp_path / "ner.txt"), str(tmp_path / "ner.txt"), max_length=32)
    trainer = make_trainer(tmp_path, callbacks=[PredictionWriter()])
    trainer.predict(TokenClassification(tiny_bert), ner, return_predictions=False)
    tagged = read(Path(str(trainer.log_dir)))
    assert [row["words"] for row in tagged] == [["good", "film"], ["the"]]
    assert all(len(row["words"]) == len(row["prediction"]) for row in tagged)
