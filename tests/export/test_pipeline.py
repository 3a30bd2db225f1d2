"""`transformers.pipeline` on an exported folder, where this package is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from lowrank_pl.export import export, from_pretrained
from tests.export.test_export import checkpoint
from tests.support.forks import Forks

TEXTS = ["a good film", "the awful plot and the great film", "it is on the plot."]
REMOTE = """
import json, sys
sys.modules["lowrank_pl"] = None  # as where it is not installed
from transformers import pipeline
texts = json.loads(sys.argv[1])
asked = {"text-classification": {"top_k": None}, "token-classification": {"ignore_labels": []}}
found = {}
for task, arguments in asked.items():
    run = pipeline(task, model=task, trust_remote_code=True, device="cpu", **arguments)
    found[task] = run(texts)
json.dump(found, open("found.json", "w"), default=float)
"""


@pytest.fixture(scope="module")
def folder(transformers_loaded: Forks, tiny_bert: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model per task under the task's name, and what their pipelines said."""
    where = tmp_path_factory.mktemp("pipeline")
    for task, kind in (("text-classification", "classification"), ("token-classification", "token_classification")):
        checkpoint(tiny_bert, where / f"{kind}.ckpt", kind)
        export(str(where / f"{kind}.ckpt"), str(where / task))
    transformers_loaded.run(["-c", REMOTE, json.dumps(TEXTS)], where)
    return where


def said(folder: Path, task: str) -> list[Any]:
    found: list[Any] = json.loads((folder / "found.json").read_text())[task]
    assert len(found) == len(TEXTS)
    return found


@torch.no_grad()
def probabilities(where: Path, text: str) -> tuple[Tensor, dict[int, str]]:
    """Of the model as this package loads it, `[classes]` or `[tokens, classes]`, and the names of the classes."""
    model: Any = from_pretrained(str(where))
    inputs = AutoTokenizer.from_pretrained(where)(text, return_tensors="pt")
    return model(**inputs).logits[0].softmax(-1), model.config.id2label


def test_text_classification_gives_the_loaded_models_scores(folder: Path) -> None:
    scores = []
    for text, found in zip(TEXTS, said(folder, "text-classification"), strict=True):
        expected, names = probabilities(folder / "text-classification", text)
        assert set(names.values()) == {"bad", "good"}
        assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(
            {names[index]: float(value) for index, value in enumerate(expected)}, rel=0, abs=1e-6
        )
        scores.append(found[0]["score"])
    assert len(set(scores)) == len(TEXTS)


def test_token_classification_gives_the_loaded_models_scores(folder: Path) -> None:
    for text, found in zip(TEXTS, said(folder, "token-classification"), strict=True):
        expected, names = probabilities(folder / "token-classification", text)
        best = expected.max(-1)
        assert len(found) == len(expected) - 2  # without [CLS] and [SEP]
        for entry in found:
            index = entry["index"]
            assert entry["entity"] == names[int(best.indices[index])]
            assert entry["score"] == pytest.approx(float(best.values[index]), rel=0, abs=1e-6)
