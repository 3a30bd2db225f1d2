"""Measuring inside a run: batches, cache, precision."""

import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_pl.importance.passes import Passes
from lowrank_pl.strategies import FWSVD, Calibration
from lowrank_pl.strategies.calibration import loss_identity
from lowrank_pl.tasks import SequenceClassification
from tests.support.runs import make_task, make_trainer
from tests.support.synthetic import SyntheticBatches, SyntheticData


class Smoothed(SequenceClassification):
    """A task with an option of its own."""

    def __init__(self, *args: Any, smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.smoothing = smoothing

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)


class Weighted(SequenceClassification):
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none") * (1 + labels)


def renamed(kind: type[SequenceClassification], losses: Any) -> type[SequenceClassification]:
    """A class of the same name and place with another loss, as after an edit of its file."""
    return type(kind.__name__, (SequenceClassification,), {"losses": losses, "__module__": kind.__module__})


def strategy(folder: Path, **options: Any) -> FWSVD:
    return FWSVD("both", keep_ratio=0.5, calibration=Calibration(cache_dir=str(folder), **options))


def fit(task: SequenceClassification, folder: Path, data: Any = None, **arguments: Any) -> SequenceClassification:
    trainer = make_trainer(folder, limit_train_batches=1, limit_val_batches=1, **arguments)
    trainer.fit(task, datamodule=data or SyntheticData())
    return task


def task(pretrained: str, folder: Path, kind: Any = SequenceClassification, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(pretrained, strategy=strategy(folder), **options)


def half(_: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none") / 2


def test_the_cache_knows_the_tasks_options_and_code(tiny_bert: str, tmp_path: Path) -> None:
    cache = tmp_path / "fisher"
    others: list[tuple[Any, dict[str, Any]]] = [
        (SequenceClassification, {}),
        (Smoothed, {}),
        (Smoothed, {"smoothing": 0.2}),
        (Weighted, {}),
        (renamed(Weighted, half), {}),
    ]
    for count, (kind, options) in enumerate(others, start=1):
        for _ in range(2):  # the second time it is read
            fit(task(tiny_bert, cache, kind, **options), tmp_path)
            assert len(list(cache.iterdir())) == count


def test_the_losses_identity_leaves_out_what_does_not_matter(tiny_bert: str, tmp_path: Path) -> None:
    trainer, data = make_trainer(tmp_path), SyntheticData()

    def identified(change: Any = lambda task: None, **options: Any) -> str:
        made = make_task(tiny_bert, strategy(tmp_path), **options)
        made.build(data.target)
        change(made)
        return loss_identity(trainer, made)

    same = [
        identified(),
        identified(lambda task: setattr(task, "strategy", FWSVD(keep_ratio=0.1))),
        identified(warmup=0.3, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0)),
        identified(lambda task: setattr(task, "pretrained", "elsewhere")),
    ]
    assert len(set(same)) == 1
    different = [
        same[0],
        identified(lambda task: setattr(task, "temperature", 2.0)),
        identified(lambda task: setattr(task, "criterion", nn.CrossEntropyLoss(reduction="none"))),
        identified(lambda task: task.register_buffer("class_weights", torch.tensor([1.0, 1.0]))),
        identified(lambda task: task.register_buffer("class_weights", torch.tensor([1.0, 5.0]))),
        identified(lambda task: task.register_buffer("class_weights", torch.tensor([1.0, 5.0]).double(), False)),
        identified(lambda task: setattr(task, "scale", nn.Parameter(torch.tensor(1.0)))),
        identified(lambda task: setattr(task, "scale", nn.Parameter(torch.tensor(2.0)))),
        identified(lambda task: setattr(task, "losses", lambda logits, labels: logits.sum(1) * labels)),
    ]
    assert len(set(different)) == len(different)


def test_a_cache_that_cannot_be_written_only_warns(
    tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a file"
    file.write_text("in the way", encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="lowrank_pl"):
        made = fit(task(tiny_bert, file / "fisher"), tmp_path)
    assert made.compression is not None
    assert f"FisherSums is not kept: {file / 'fisher'} cannot be written" in caplog.text


def test_cache_files_have_the_mode_that_the_umask_asks_for(tiny_bert: str, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        fit(task(tiny_bert, tmp_path / "fisher"), tmp_path)
    finally:
        os.umask(before)
    (file,) = (tmp_path / "fisher").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


class Asked(SyntheticData):
    """Writes down the batch sizes that calibration asks for."""

    def calibration_batches(self, batch_size: int, *args: Any, **kwargs: Any) -> SyntheticBatches:
        self.asked = batch_size
        return super().calibration_batches(batch_size, *args, **kwargs)


@pytest.mark.parametrize(("given", "expected"), [(None, 6), (11, 11)])
def test_batches_are_by_default_those_of_training(
    tiny_bert: str, tmp_path: Path, given: int | None, expected: int
) -> None:
    data = Asked(batch_size=6)
    fit(make_task(tiny_bert, strategy(tmp_path / "fisher", batch_size=given)), tmp_path, data)
    assert data.asked == expected


def test_data_that_tell_no_batch_size_are_asked_for_32(tiny_bert: str, tmp_path: Path) -> None:
    data = Asked()
    loader = data.train_dataloader()
    data.train_dataloader = lambda: loader  # type: ignore[method-assign]
    data.val_dataloader = lambda: loader  # type: ignore[method-assign]
    del data.batch_size
    fit(make_task(tiny_bert, strategy(tmp_path / "fisher")), tmp_path, data)
    assert data.asked == 32


def test_hparams_tell_the_batch_size_too(tiny_bert: str, tmp_path: Path) -> None:
    data = Asked()
    loader = data.train_dataloader()
    data.train_dataloader = lambda: loader  # type: ignore[method-assign]
    data.val_dataloader = lambda: loader  # type: ignore[method-assign]
    del data.batch_size
    data.save_hyperparameters({"batch_size": 5})
    fit(make_task(tiny_bert, strategy(tmp_path / "fisher")), tmp_path, data)
    assert data.asked == 5


def test_a_run_goes_on_where_calibration_runs_out_of_memory(
    tiny_bert: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fit(task(tiny_bert, tmp_path / "first"), tmp_path)
    inner = Passes._losses

    def losses(self: Passes, batch: dict[str, Tensor]) -> Tensor:
        if len(batch["labels"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, batch)

    monkeypatch.setattr(Passes, "_losses", losses)
    with caplog.at_level(logging.WARNING, logger="lowrank_pl"):
        given = fit(task(tiny_bert, tmp_path / "second"), tmp_path)
    assert "out of memory with 8 samples in a calibration batch: going on with 4" in caplog.text
    states = (expected.encoder.state_dict(), given.encoder.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_passes_run_in_the_dtype_of_the_weights(
    tiny_bert: str, tmp_path: Path, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: set[torch.dtype] = set()
    inner = Passes._consume

    def consume(self: Passes, name: str, x: Tensor, g: Tensor) -> None:
        dtypes.add(g.dtype)
        inner(self, name, x, g)

    monkeypatch.setattr(Passes, "_consume", consume)
    fit(task(tiny_bert, tmp_path / "fisher"), tmp_path, precision=precision)
    assert dtypes == {torch.float32 if precision == "bf16-mixed" else torch.bfloat16}
