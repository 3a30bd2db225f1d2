"""Labels drawn from the model's predictions: what they are, that nothing else changes them, and what refuses them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_pl.errors.labels import LabelsError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import ResumeMismatchError
from lowrank_pl.strategies import SVD, Calibration, KroneckerSVD
from lowrank_pl.strategies.labels import SampledLabels, check_labels
from lowrank_pl.tasks import MaskedLM, SequenceClassification, TokenClassification
from lowrank_pl.tasks.drawn_labels import drawn_classes, drawn_values
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import Sample, SyntheticBatches, SyntheticData

MANY = 4000


def evenly(count: int = MANY) -> Tensor:
    """Numbers between 0 and 1 that fill the interval: what many draws come close to."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_classes_are_drawn_by_their_probabilities() -> None:
    logits = torch.tensor([0.2, 0.3, 0.5]).log().expand(5, 3)
    draws = torch.tensor([0.0, 0.19, 0.21, 0.49, 0.51], dtype=torch.float64)
    assert drawn_classes(logits, draws).tolist() == [0, 0, 1, 1, 2]
    assert drawn_classes(logits[0], torch.tensor(1 - 1e-12, dtype=torch.float64)).item() == 2


def test_values_are_drawn_around_the_predictions() -> None:
    draws = torch.tensor([0.5, 0.8413447460685429, 0.0], dtype=torch.float64)
    found = drawn_values(torch.tensor([3.0, -1.0, 0.0]), draws)
    torch.testing.assert_close(found[:2], torch.tensor([3.0, -1 + math.sqrt(0.5)]))
    assert found.isfinite().all()


def test_squared_gradients_are_the_curvature_of_cross_entropy() -> None:
    logits = torch.tensor([0.3, -1.0, 1.2], dtype=torch.float64)
    labels = drawn_classes(logits.expand(MANY, 3), evenly())
    given = logits.softmax(0) - F.one_hot(labels, 3)
    hessian = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z[None], torch.tensor([0])), logits)
    torch.testing.assert_close(given.mT @ given / MANY, hessian, atol=1e-3, rtol=0)


def test_squared_gradients_are_the_curvature_of_the_squared_error() -> None:
    values = torch.zeros(MANY, dtype=torch.float64)
    gradients = 2 * (values - drawn_values(values, evenly()))
    assert float(gradients.square().mean()) == pytest.approx(2, rel=1e-2)  # (y − ŷ)² has the second derivative 2


def built(task: Any, kind: Any = "classification") -> Any:
    task.build(SyntheticData(kind).target)
    return task


def labels_of(task: Any, batches: Any, seed: int = 0, rank: int = 0) -> list[Tensor]:
    return [batch["labels"] for batch in SampledLabels(task, batches, seed, rank)]


def without_labels(batches: Any) -> list[Sample]:
    return [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches]


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_labels_depend_on_seed_and_samples_alone(tiny_bert: str, kind: Any) -> None:
    task, data = built(make_task(tiny_bert), kind), SyntheticData(kind)
    task.train()
    state = torch.get_rng_state()
    drawn = SampledLabels(task, data.calibration_batches(8), 0)
    first, again = (torch.cat([batch["labels"] for batch in drawn]) for _ in range(2))
    assert torch.equal(first, again)
    assert task.encoder.training
    assert all(parameter.requires_grad for parameter in task.parameters())
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(torch.cat(labels_of(task, data.calibration_batches(5))), first)
    assert torch.equal(torch.cat(labels_of(task, without_labels(data.calibration_batches(8)))), first)
    for seed, rank in ((1, 0), (0, 1)):
        assert not torch.equal(torch.cat(labels_of(task, data.calibration_batches(8), seed, rank)), first)


def test_labels_do_not_depend_on_what_fits_into_memory(tiny_bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, data = built(make_task(tiny_bert)), SyntheticData()
    expected = labels_of(task, data.calibration_batches(8))
    inner = task.forward

    def forward(batch: Sample) -> Tensor:
        if len(batch["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(batch)  # type: ignore[no-any-return]

    monkeypatch.setattr(task, "forward", forward)
    given = labels_of(task, data.calibration_batches(8))
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize(("kind", "make"), [("token_classification", TokenClassification), ("masked_lm", MaskedLM)])
def test_only_tokens_that_have_a_label_get_one(tiny_bert: str, kind: Any, make: Any) -> None:
    task, data = built(make(tiny_bert), kind), SyntheticData(kind)
    batches = list(data.calibration_batches(8))
    for batch, labels in zip(batches, labels_of(task, batches), strict=True):
        assert torch.equal(labels == -100, batch["labels"] == -100)
        assert int(labels.max()) < task(batch).shape[-1]


def test_without_labels_every_token_of_a_text_gets_a_tag(tiny_bert: str) -> None:
    data = SyntheticData("token_classification")
    task = built(TokenClassification(tiny_bert), "token_classification")
    batches = without_labels(data.calibration_batches(8))
    for batch, labels in zip(batches, labels_of(task, batches), strict=True):
        assert torch.equal(labels != -100, batch["attention_mask"].bool())


def test_masked_tokens_are_told_by_labels_alone(tiny_bert: str) -> None:
    task = built(MaskedLM(tiny_bert), "masked_lm")
    with pytest.raises(LabelsError, match="which tokens were masked"):
        labels_of(task, without_labels(SyntheticData("masked_lm").calibration_batches(8)))


class Unlabelled(SyntheticData):
    """Data for calibration that nobody has labelled."""

    def calibration_batches(self, *args: Any, **kwargs: Any) -> Any:
        batches = super().calibration_batches(*args, **kwargs)

        class Batches(SyntheticBatches):
            def __init__(self) -> None:
                self.num_samples, self.fingerprint = batches.num_samples, f"{batches.fingerprint}-unlabelled"
                self._chunks = batches._chunks

            def __iter__(self) -> Any:
                return iter(without_labels(batches))

        return Batches()


def factorised(pretrained: str, folder: Path, cache: Path, data: Any = None, **options: Any) -> Any:
    strategy = KroneckerSVD(keep_ratio=0.4, calibration=Calibration(cache_dir=str(cache), **options))
    task = make_task(pretrained, strategy)
    make_trainer(folder, logger=False, max_epochs=0).fit(task, datamodule=data or SyntheticData())
    return task


def same(first: Any, second: Any) -> bool:
    one, other = first.encoder.state_dict(), second.encoder.state_dict()
    return all(one[name].shape == other[name].shape and torch.equal(one[name], other[name]) for name in one)


def test_sampled_runs_are_reproducible_and_cached_apart(tiny_bert: str, tmp_path: Path) -> None:
    first = factorised(tiny_bert, tmp_path / "a", tmp_path / "one", labels="sampled")
    assert same(first, factorised(tiny_bert, tmp_path / "b", tmp_path / "two", labels="sampled"))
    assert same(first, factorised(tiny_bert, tmp_path / "c", tmp_path / "one", labels="sampled"))
    assert len(list((tmp_path / "one").iterdir())) == 1
    assert same(first, factorised(tiny_bert, tmp_path / "d", tmp_path / "three", Unlabelled(), labels="sampled"))
    assert not same(first, factorised(tiny_bert, tmp_path / "e", tmp_path / "one"))
    assert not same(first, factorised(tiny_bert, tmp_path / "f", tmp_path / "one", labels="sampled", seed=1))
    assert len(list((tmp_path / "one").iterdir())) == 3
    assert first.compression.options["labels"] == "sampled"


def test_resuming_with_other_labels_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    def strategy(labels: Any) -> KroneckerSVD:
        return KroneckerSVD(keep_ratio=0.4, calibration=Calibration(labels=labels, cache=False))

    trainer = make_trainer(tmp_path, limit_train_batches=2)
    trainer.fit(make_task(tiny_bert, strategy("sampled")), datamodule=SyntheticData())
    again = make_trainer(tmp_path, max_epochs=2)
    with pytest.raises(ResumeMismatchError, match="labels='sampled' there, labels='observed' here"):
        again.fit(make_task(tiny_bert, strategy("observed")), SyntheticData(), ckpt_path=last_checkpoint(trainer))


def test_observed_labels_that_are_not_there_are_refused(tiny_bert: str, tmp_path: Path) -> None:
    with pytest.raises(LabelsError, match=r"no labels.*to 'sampled' to draw them"):
        factorised(tiny_bert, tmp_path, tmp_path / "cache", Unlabelled())


def test_compress_refuses_them_before_the_dense_model_is_scored(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tiny_bert, KroneckerSVD(keep_ratio=0.4))
    monkeypatch.setattr(task, "validation_step", lambda *_: pytest.fail("scored"))
    with pytest.raises(LabelsError, match=r"no labels.*to 'sampled' to draw them"):
        make_trainer(tmp_path).compress(task, Unlabelled(), output=str(tmp_path / "out"))


@pytest.mark.parametrize("method", [SVD, KroneckerSVD])
def test_recalibration_needs_no_labels_where_they_are_drawn(method: Any, tiny_bert: str, tmp_path: Path) -> None:
    calibrations = [Calibration(labels=labels, cache=False) for labels in ("sampled", "observed")]
    tasks = [
        make_task(tiny_bert, method(keep_ratio=0.4, calibration=calibration, recalibration=True))
        for calibration in calibrations
    ]
    make_trainer(tmp_path, logger=False, max_epochs=0).fit(tasks[0], datamodule=Unlabelled())
    assert "recalibrated on 48 outputs" in tasks[0].compression.notes[-1]
    with pytest.raises(LabelsError, match=r"no labels.*to 'sampled' to draw them"):
        make_trainer(tmp_path, logger=False, max_epochs=0).fit(tasks[1], datamodule=Unlabelled())


def test_a_task_that_cannot_draw_labels_is_refused() -> None:
    task: Any = SequenceClassification()
    check_labels(task, "sampled")
    stranger: Any = SyntheticData()
    check_labels(stranger, "observed")
    with pytest.raises(LabelsError, match=r"no method drawn_labels.*to 'observed'"):
        check_labels(stranger, "sampled")


@pytest.mark.parametrize("labels", ["none", "true"])
def test_words_that_are_no_choice_are_refused(labels: Any) -> None:
    with pytest.raises(RangeError, match=r"calibration\.labels.*side 'input'"):
        Calibration(labels=labels)


def test_methods_that_measure_nothing_tell_no_labels() -> None:
    assert "labels" not in SVD(keep_ratio=0.5).options()
