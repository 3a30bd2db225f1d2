"""Training with a teacher: what is minimised, what stays as it was, and where the teacher must not turn up."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch._dynamo
from lightning.pytorch import callbacks as plc
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lowrank_pl.contract import TargetKind
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import CalibrationError, ResumeMismatchError
from lowrank_pl.monitoring.report import build_report, to_markdown
from lowrank_pl.strategies import SVD, CompressionStrategy, RankDyna
from lowrank_pl.strategies.averaging import averaged_models
from lowrank_pl.strategies.calibration import loss_identity
from lowrank_pl.tasks import Distillation, MaskedLM, SequenceClassification, TokenClassification
from lowrank_pl.tasks.teacher import Teacher
from tests.support.runs import last_checkpoint, make_task, make_trainer
from tests.support.synthetic import SyntheticData, collate


class OrderedData(SyntheticData):
    """In another order in every epoch, which the epoch alone decides."""

    def train_dataloader(self) -> DataLoader[Any]:
        data: Any = self.train
        sampler: Any = DistributedSampler(data, 1, 0)
        generator = torch.Generator().manual_seed(0)
        return DataLoader(data, self.batch_size, sampler=sampler, collate_fn=collate, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(self.validation, self.batch_size, collate_fn=collate, generator=generator)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dense(tiny_bert: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint of a dense model that has seen its task."""
    trainer = make_trainer(tmp_path_factory.mktemp("dense"), limit_train_batches=2)
    trainer.fit(make_task(tiny_bert), datamodule=SyntheticData())
    return last_checkpoint(trainer)


def student(dense: str, distillation: Distillation | None, strategy: CompressionStrategy | None = None) -> Any:
    return make_task(None, strategy, init_from=dense, distillation=distillation)


def fit(task: Any, folder: Path, data: Any = None, resume: str | None = None, **arguments: Any) -> pl.Trainer:
    trainer = make_trainer(folder, **{"limit_train_batches": 3, **arguments})
    trainer.fit(task, datamodule=data or OrderedData(), ckpt_path=resume)
    return trainer


def same(one: Any, other: Any) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def batch_of(kind: TargetKind = "classification") -> Any:
    return next(iter(SyntheticData(kind).val_dataloader()))


# What is minimised.


def test_a_model_learns_nothing_from_itself(dense: str) -> None:
    task = student(dense, Distillation(labels=0))
    task.build()
    task.take_teacher()
    task.eval()  # no dropout, as in the teacher
    loss = task.training_step(batch_of(), 0)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(p.grad.abs().max() for p in task.parameters() if p.grad is not None) < 1e-6


def test_no_weight_changes_no_bit(dense: str, tmp_path: Path) -> None:
    """The teacher, asked all the same, draws no random number either: dropout is on."""
    tasks = []
    for weights in (None, {"logits": 0, "hidden_states": 0}, {"logits": 1e-36, "hidden_states": 1e-36}):
        task = student(dense, None if weights is None else Distillation(**weights))
        fit(task, tmp_path)
        tasks.append(task)
    plain, unasked, unheard = tasks
    assert same(plain, unasked)
    assert unasked._teacher is None
    assert same(plain, unheard)
    assert unheard._teacher is not None


def test_the_log_tells_the_parts_and_val_loss_stays_the_tasks(dense: str, tmp_path: Path) -> None:
    task = student(dense, Distillation(temperature=3, logits=0.5, hidden_states=2, labels=0.25), SVD(keep_ratio=0.5))
    metrics = fit(task, tmp_path).callback_metrics
    parts = 0.25 * metrics["train/task_loss"] + 0.5 * metrics["train/distillation"] + 2 * metrics["train/hidden_states"]
    assert metrics["train/loss"] == pytest.approx(float(parts), rel=1e-5)
    assert min(metrics["train/distillation"], metrics["train/hidden_states"]) > 1e-5
    report = build_report(task, "fit", "val", {}, 1.0)
    assert report["distillation"] == task.distillation.options()
    assert "* distillation: teacher self, temperature 3, " in to_markdown(report)
    scored = make_trainer(tmp_path).validate(task, SyntheticData(), verbose=False)
    assert scored[0]["val/loss"] == pytest.approx(float(metrics["val/loss"]), abs=1e-6)


def test_values_are_compared_by_squares_and_tokens_where_labels_count() -> None:
    generator = torch.Generator().manual_seed(0)
    values = SequenceClassification("nowhere")
    values.target = SyntheticData("regression").target
    ours, theirs = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]])
    assert values.imitation_loss(ours, theirs, torch.zeros(2), 5.0).item() == 2.5
    labels = torch.tensor([[1, -100, 2], [-100, 0, -100]])
    own, other = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    spoiled = other.masked_fill((labels == -100)[..., None], torch.nan)
    p, q = own[labels != -100].log_softmax(-1), other[labels != -100].softmax(-1)
    for task in (TokenClassification("nowhere"), MaskedLM("nowhere")):
        found = task.imitation_loss(own, spoiled, labels, 1.0)
        torch.testing.assert_close(found, F.kl_div(p, q, reduction="batchmean"))
        assert task.imitation_loss(own, spoiled, torch.full_like(labels, -100), 1.0).item() == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"temperature": 0}, "temperature"),
        ({"logits": -1}, "logits"),
        ({"hidden_states": float("inf")}, "hidden_states"),
        ({"labels": 0, "logits": 0}, "do not train the head"),
        ({"cache": True, "hidden_states": 1}, "only logits are kept"),
    ],
)
def test_options_out_of_range(arguments: Any, told: str) -> None:
    with pytest.raises(RangeError, match=told):
        Distillation(**arguments)


# Where the teacher must not turn up.


def test_the_teacher_is_no_part_of_the_model(dense: str, tmp_path: Path) -> None:
    plain, taught = student(dense, None), student(dense, Distillation())
    runs = [
        fit(task, tmp_path / name, limit_train_batches=1, callbacks=[plc.EMAWeightAveraging()])
        for name, task in (("plain", plain), ("taught", taught))
    ]
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in taught.named_modules()]
    groups = [[[p.shape for p in group["params"]] for group in run.optimizers[0].param_groups] for run in runs]
    assert groups[0] == groups[1]
    before, after = (torch.load(last_checkpoint(run), weights_only=True) for run in runs)
    assert before["state_dict"].keys() == after["state_dict"].keys()
    assert after.keys() == before.keys()
    (average,) = averaged_models(runs[1])
    assert average._teacher is taught._teacher
    # What calibration measures is found again in the cache.
    assert loss_identity(runs[0], plain) == loss_identity(runs[1], taught)


def test_scoring_and_loading_need_no_teacher(tiny_bert: str, dense: str, tmp_path: Path) -> None:
    path = last_checkpoint(fit(student(dense, Distillation(), SVD(keep_ratio=0.5)), tmp_path))
    gone = make_task(tiny_bert, distillation=Distillation("nowhere"))
    make_trainer(tmp_path).test(gone, SyntheticData(), ckpt_path=path, verbose=False)
    assert SequenceClassification.load_from_checkpoint(path).distillation is None


# Resuming.


@pytest.mark.parametrize("name", ["self", "cached", "rankdyna"])
def test_resumes_bit_for_bit(tiny_bert: str, dense: str, tmp_path: Path, name: str) -> None:
    def run(folder: str, resume: str | None) -> Any:
        if name == "rankdyna":
            # From a head that has learned nothing, by a teacher that has.
            task = make_task(tiny_bert, RankDyna(keep_ratio=0.5), distillation=Distillation(dense))
        else:
            asked = Distillation(hidden_states=0, cache=True) if name == "cached" else Distillation()
            task = student(dense, asked, SVD(keep_ratio=0.5))
        keeping = plc.ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1)
        fit(task, tmp_path, resume=resume, max_epochs=2, callbacks=[keeping])
        return task

    whole = run("whole", None)
    assert same(whole, run("resumed", str(tmp_path / "whole" / "epoch=0.ckpt")))


class Unprepared(OrderedData):
    """Whose preparation a test looks out for."""


def test_resuming_goes_on_with_the_same_teacher(dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.load(dense, weights_only=True)
    other["state_dict"]["encoder.classifier.bias"] += 1
    torch.save(other, tmp_path / "other.ckpt")
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes(Path(dense).read_bytes())
    path = last_checkpoint(fit(student(dense, Distillation(dense)), tmp_path, limit_train_batches=1))
    refused: list[tuple[Distillation | None, str]] = [
        (Distillation(dense, temperature=3), "distillation.temperature=2.0 there, 3 here"),
        (Distillation(str(tmp_path / "other.ckpt")), "distillation.teacher='.*' there, '.*' here"),
        (None, "there, None here"),
    ]
    monkeypatch.setattr(Unprepared, "prepare_data", lambda _: pytest.fail("data were prepared before it was refused"))
    for distillation, told in refused:
        with pytest.raises(ResumeMismatchError, match=f"it learned from something else .*{told}"):
            fit(student(dense, distillation), tmp_path, Unprepared(), resume=path, max_epochs=2)
    fit(student(dense, Distillation(str(moved))), tmp_path, resume=path, max_epochs=2, limit_train_batches=1)


# What is asked once.


def test_the_cache_asks_for_every_sample_once(
    dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    call = Teacher.__call__

    def counting(self: Teacher, batch: Any, hidden_states: bool) -> Any:
        asked.append(len(batch["input_ids"]))
        return call(self, batch, hidden_states)

    monkeypatch.setattr(Teacher, "__call__", counting)
    losses = []
    for cache in (False, True):
        task = student(dense, Distillation(hidden_states=0, cache=cache), SVD(keep_ratio=0.5))
        run = fit(task, tmp_path / str(cache), SyntheticData(), limit_train_batches=None, max_epochs=2)
        losses.append(float(run.callback_metrics["train/distillation"]))
        assert sum(asked) == 48 if cache else 96
        asked.clear()
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    with caplog.at_level(logging.WARNING):
        fit(task, tmp_path, SyntheticData(seed=1))  # the same model goes on with other data
    assert sum(asked) == 24
    assert caplog.text.count("samples that the data do not hand out") == 1


def test_the_cache_keeps_logits_of_tokens(tiny_bert: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, limit_train_batches=1)
    trainer.fit(TokenClassification(tiny_bert), datamodule=SyntheticData("token_classification"))
    found = []
    for cache in (False, True):
        pl.seed_everything(0, verbose=False)
        asked = Distillation(hidden_states=0, cache=cache)
        task = TokenClassification(init_from=last_checkpoint(trainer), strategy=SVD(keep_ratio=0.5), distillation=asked)
        run = fit(task, tmp_path, SyntheticData("token_classification"))
        found.append(float(run.callback_metrics["train/distillation"]))
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[0] > 0


def test_a_cache_that_cannot_be(tiny_bert: str, dense: str, tmp_path: Path) -> None:
    asked = Distillation(hidden_states=0, cache=True)
    with pytest.raises(RangeError, match="masks change with the epoch"):
        fit(MaskedLM(tiny_bert, distillation=asked), tmp_path, SyntheticData("masked_lm"))
    task, data = student(dense, asked), SyntheticData()
    task.build(data.target)
    with pytest.raises(CalibrationError, match=r"distillation.cache needs calibration batches"):
        make_trainer(tmp_path).fit(task, data.train_dataloader())


# Other features.


def test_other_features(dense: str, tmp_path: Path) -> None:
    """Accumulation, half precision, clipping and a search for the learning rate; then compiled."""
    task = student(dense, Distillation(), RankDyna(keep_ratio=0.5))
    search = plc.LearningRateFinder(num_training_steps=4)
    fit(
        task,
        tmp_path,
        limit_train_batches=None,
        max_epochs=4,
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[search],
    )
    assert task.compression.keep_ratio <= 0.5
    assert all(bool(torch.isfinite(p).all()) for p in task.parameters())


def test_compiled(dense: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    task = student(dense, Distillation(), SVD(keep_ratio=0.5))
    model: Any = torch.compile(task, backend="eager")
    run = fit(model, tmp_path, limit_train_batches=1, limit_val_batches=0)
    torch._dynamo.reset()
    assert run.callback_metrics["train/hidden_states"] > 0
