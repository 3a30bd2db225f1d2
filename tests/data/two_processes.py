"""Validates, fits and predicts in `DEVICES` processes and writes what each of them saw: `FOLDER MODEL DATA DEVICES`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

sys.path.insert(0, str(Path(__file__).parents[2]))

from lowrank_pl.data import GLUE
from lowrank_pl.monitoring import PredictionWriter
from tests.support.runs import make_task, make_trainer


class Counter(pl.Callback):
    """Counts evaluated samples and batches of this process."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.batches.append(len(batch["labels"]))


def trainer_for(folder: Path, devices: int, *callbacks: pl.Callback) -> Any:
    return make_trainer(
        folder,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        limit_train_batches=1,
    )


def run(folder: Path, model: str, data_folder: str, devices: int) -> None:
    data = GLUE(model, "sst2", data_folder, max_length=64, batch_size=4, eval_batch_size=1)
    task = make_task(model)
    task.build(data.task.target)
    counter = Counter()
    trainer = trainer_for(folder, devices, counter)
    (scores,) = trainer.validate(task, data, verbose=False)
    found = {"batches": counter.batches, "accuracy": scores["val/accuracy"], "loss": scores["val/loss"]}
    predicted = trainer_for(folder, devices, PredictionWriter())
    predicted.predict(task, data)
    fitted = trainer_for(folder, devices, fit_counter := Counter())
    fitted.fit(task, datamodule=data)
    found["fit"] = fit_counter.batches
    (folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
