"""A stopped run goes on with the batches that it has not seen, in the order that the whole run has."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lowrank_pl.data import TextFiles
from lowrank_pl.errors.data import ResumedDataError
from tests.data.samples import write
from tests.support.runs import make_task, make_trainer

SAMPLES, BATCH = 40, 4
STEPS = 2 * SAMPLES // BATCH


class Seen(pl.Callback):
    """Every batch's tokens, by step."""

    def __init__(self) -> None:
        self.batches: dict[int, list[list[int]]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches[trainer.global_step] = batch["input_ids"].tolist()


def fit(
    pretrained: str, folder: Path, train: str, workers: int, resume: str | None = None, **settings: Any
) -> tuple[Seen, Any]:
    seen, saver = Seen(), ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    last = ModelCheckpoint(folder, "epoch-{epoch}", save_top_k=-1)
    trainer = make_trainer(folder, max_epochs=2, callbacks=[seen, saver, last])
    arguments: dict[str, Any] = {"batch_size": BATCH, "num_workers": workers, **settings}
    data = TextFiles(pretrained, train=train, validation=train, text="text", label="label", **arguments)
    task = make_task(pretrained)
    trainer.fit(task, datamodule=data, ckpt_path=resume)
    return seen, task.state_dict()


def table(folder: Path, samples: int = SAMPLES) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [f"{' '.join(letters[(i * 7 + k) % 26] for k in range(3 + i % 9))},{i % 2}" for i in range(samples)]
    return str(write(folder / "train.csv", "text,label\n" + "\n".join(rows) + "\n"))


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_with_the_batches_not_yet_seen(tiny_bert: str, tmp_path: Path, workers: int) -> None:
    train = table(tmp_path)
    whole, state = fit(tiny_bert, tmp_path / "whole", train, workers)
    assert list(whole.batches) == list(range(STEPS))
    first, second = ([whole.batches[step] for step in range(start, start + 10)] for start in (0, 10))
    assert first != second  # another order in every epoch
    for step in (3, 10, 14):
        checkpoint = str(tmp_path / "whole" / f"step={step}.ckpt")
        resumed, resumed_state = fit(tiny_bert, tmp_path / f"from-{step}", train, workers, checkpoint)
        assert resumed.batches == {s: batch for s, batch in whole.batches.items() if s >= step}
        assert all(torch.equal(tensor, resumed_state[name]) for name, tensor in state.items())
    boundary = str(next((tmp_path / "whole").glob("epoch-epoch=0*.ckpt")))
    resumed, resumed_state = fit(tiny_bert, tmp_path / "from-epoch", train, workers, boundary)
    assert resumed.batches == {s: batch for s, batch in whole.batches.items() if s >= 10}
    assert all(torch.equal(tensor, resumed_state[name]) for name, tensor in state.items())


def test_other_settings_are_refused_in_the_middle_and_told_at_the_start_of_an_epoch(
    tiny_bert: str, tmp_path: Path
) -> None:
    train = table(tmp_path)
    fit(tiny_bert, tmp_path / "whole", train, 0)
    middle = str(tmp_path / "whole" / "step=3.ckpt")
    boundary = str(next((tmp_path / "whole").glob("epoch-epoch=0*.ckpt")))
    other = table(tmp_path / "other", SAMPLES - 4)
    settings: list[tuple[str, int, dict[str, Any], str]] = [
        (train, 0, {"batch_size": 8}, "batch_size was 4 and is 8"),
        (train, 0, {"seed": 1}, "seed was 0 and is 1"),
        (train, 0, {"length_grouping": False}, "length_grouping was True and is False"),
        (train, 2, {}, "num_workers was 0 and is 2"),
        (other, 0, {}, "training data was '"),
    ]
    for at, (path, workers, changed, told) in enumerate(settings):
        with pytest.raises(ResumedDataError, match=f"in the middle of an epoch .*: {told}"):
            fit(tiny_bert, tmp_path / str(at), path, workers, middle, **changed)
    with pytest.warns(UserWarning, match="resuming with other data settings .*: batch_size was 4 and is 8"):
        fit(tiny_bert, tmp_path / "warned", train, 0, boundary, batch_size=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="resuming with other data")
        fit(tiny_bert, tmp_path / "workers", train, 2, boundary)


def test_overfitting_sees_the_same_samples_in_the_order_of_the_file(tiny_bert: str, tmp_path: Path) -> None:
    seen = Seen()
    data = TextFiles(tiny_bert, train=table(tmp_path), batch_size=BATCH)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="You requested to overfit")
        trainer = make_trainer(tmp_path, max_epochs=2, overfit_batches=2, callbacks=[seen])
        trainer.fit(make_task(tiny_bert), datamodule=data)
    first = [ids for step in (0, 1) for ids in seen.batches[step]]
    assert first == [ids for step in (2, 3) for ids in seen.batches[step]]
    stripped = [[token for token in ids if token] for ids in first]
    assert stripped == data.split("train")["input_ids"][: 2 * BATCH]
