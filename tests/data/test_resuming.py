"""A stopped run goes on with the batches that it has not seen, in the order that the whole run has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lowrank_pl.data import TextFiles
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


def fit(pretrained: str, folder: Path, train: str, workers: int, resume: str | None = None) -> tuple[Seen, Any]:
    seen, saver = Seen(), ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    last = ModelCheckpoint(folder, "epoch-{epoch}", save_top_k=-1)
    trainer = make_trainer(folder, max_epochs=2, callbacks=[seen, saver, last])
    data = TextFiles(
        pretrained, train=train, validation=train, text="text", label="label", batch_size=BATCH, num_workers=workers
    )
    task = make_task(pretrained)
    trainer.fit(task, datamodule=data, ckpt_path=resume)
    return seen, task.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_with_the_batches_not_yet_seen(tiny_bert: str, tmp_path: Path, workers: int) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [f"{' '.join(letters[(i * 7 + k) % 26] for k in range(3 + i % 9))},{i % 2}" for i in range(SAMPLES)]
    train = str(write(tmp_path / "train.csv", "text,label\n" + "\n".join(rows) + "\n"))
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
