"""Metrics against hand-computed cases."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch

from lowrank_pl.contract import TargetSpec
from lowrank_pl.tasks.metrics import EntityF1, build_metrics, score
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import SyntheticData


def logits_of(classes: list[int], count: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), count).float()


def test_f1_is_that_of_class_one() -> None:
    metrics = build_metrics(TargetSpec("MRPC", "classification", ("no", "yes"), ("f1", "accuracy"), "f1"))
    metrics.update(logits_of([1, 1, 0, 0], 2), torch.tensor([1, 0, 1, 0]))
    values = metrics.compute()
    assert values["f1"] == pytest.approx(0.5)
    assert values["accuracy"] == pytest.approx(0.5)
    metrics.reset()
    metrics.update(logits_of([1] * 10, 2), torch.tensor([1] * 7 + [0] * 3))
    assert metrics.compute()["f1"] == pytest.approx(2 * 0.7 / 1.7)


def test_matthews_of_a_constant_prediction_is_zero() -> None:
    metrics = build_metrics(TargetSpec("CoLA", "classification", ("no", "yes"), ("matthews",)))
    metrics.update(logits_of([1, 1, 1, 1], 2), torch.tensor([1, 0, 1, 0]))
    assert metrics.compute()["matthews"] == 0


def test_score_is_the_mean_unless_one_is_named() -> None:
    values = {"pearson": torch.tensor(0.8), "spearman": torch.tensor(0.6)}
    assert score(TargetSpec("STS-B", "regression", (), ("pearson", "spearman")), values) == pytest.approx(0.7)
    named = TargetSpec("STS-B", "regression", (), ("pearson", "spearman"), "spearman")
    assert score(named, values) == pytest.approx(0.6)


def test_entity_f1_counts_whole_entities() -> None:
    tags = ("O", "B-PER", "I-PER", "B-LOC")
    metric = EntityF1(tags)
    true = torch.tensor([[-100, 1, 2, 0, 3, -100]])
    predicted = [0, 1, 2, 0, 1, 3]  # the person is right, the place has the wrong type, the last is not scored
    metric.update(logits_of(predicted, 4)[None], true)
    assert metric.compute() == pytest.approx(2 * 1 / (2 + 2))
    metric.update(logits_of([0, 1, 0, 0, 0, 0], 4)[None], true)  # half a person is no person
    assert metric.compute() == pytest.approx(2 * 1 / (3 + 4))


def test_perplexity_of_a_uniform_guess_is_the_number_of_classes() -> None:
    metrics = build_metrics(TargetSpec("text", "masked_lm", (), ("perplexity",)))
    metrics.update(torch.zeros(2, 3, 50), torch.tensor([[1, -100, 3], [-100, -100, 7]]))
    assert metrics.compute()["perplexity"] == pytest.approx(50)


def test_spec_survives_its_dictionary() -> None:
    spec = TargetSpec("MRPC", "classification", ("no", "yes"), ("f1", "accuracy"), "f1")
    assert TargetSpec.from_dict(spec.to_dict()) == spec


def test_collapse_to_one_class_is_told(tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = make_task(tiny_bert)
    task.build(SyntheticData().target)
    with torch.no_grad():
        task.encoder.classifier.bias.copy_(torch.tensor([100.0, -100.0]))
    with caplog.at_level(logging.WARNING):
        results = make_trainer(tmp_path).test(task, SyntheticData(), verbose=False)
    assert results[0]["test/collapsed"] == 1.0
    assert "all 24 samples are predicted as 'no'" in caplog.text
    with torch.no_grad():
        task.encoder.classifier.bias.zero_()
        task.encoder.classifier.weight.mul_(1e3)
    assert not math.isnan(make_trainer(tmp_path).test(task, SyntheticData(), verbose=False)[0]["test/score"])
