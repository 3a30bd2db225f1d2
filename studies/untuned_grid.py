"""Scores static methods without any tuning, against the dense models that they start from: one table.

Every compression is a `LowRankTrainer.compress` with a report.json of its own, so a stopped grid goes on where it was
and every number can be looked up. Dense models are fine-tuned first (`studies/static_grid.py` trains the same ones),
one folder per task and seed:

    python studies/untuned_grid.py --dense logs/dense/MRPC-0:MRPC logs/dense/STS-B-0:STS-B --glue PATH/TO/glue

A folder has `checkpoints/last.ckpt`; after the colon stands the GLUE task, or `Docstrings`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from options import glue, parser, read
from tables import describe, header, line, write

from lowrank_pl.allocation import Uniform
from lowrank_pl.data import Docstrings, TextDataModule
from lowrank_pl.strategies import FWSVD, SVD, TFWSVD, Calibration, KroneckerSVD, Recalibration, Refit, StaticStrategy
from lowrank_pl.tasks import SequenceClassification
from lowrank_pl.trainer import LowRankTrainer

Make = Callable[[float, Calibration], StaticStrategy]
METHODS: dict[str, Make] = {
    "SVD": lambda ratio, _: SVD(keep_ratio=ratio),
    "FWSVD input": lambda ratio, few: FWSVD("input", keep_ratio=ratio, calibration=few),
    "FWSVD both": lambda ratio, few: FWSVD("both", keep_ratio=ratio, calibration=few),
    "TFWSVD": lambda ratio, few: TFWSVD(keep_ratio=ratio, calibration=few),
    "whitening": lambda ratio, few: KroneckerSVD("input", keep_ratio=ratio, calibration=few),
    "KroneckerSVD uniform": lambda ratio, few: KroneckerSVD(keep_ratio=ratio, calibration=few, allocation=Uniform()),
    "KroneckerSVD": lambda ratio, few: KroneckerSVD(keep_ratio=ratio, calibration=few),
    "KroneckerSVD recalibrated": lambda ratio, few: KroneckerSVD(
        keep_ratio=ratio, calibration=few, recalibration=Recalibration()
    ),
    "KroneckerSVD refit": lambda ratio, few: KroneckerSVD(keep_ratio=ratio, calibration=few, refit=Refit()),
}


def data_of(task: str, arguments: argparse.Namespace) -> TextDataModule:
    """The data that the dense models were tuned on."""
    if task == "Docstrings":
        return Docstrings(arguments.pretrained, max_length=48, batch_size=32)
    return glue(task, arguments)


def compress(method: str, ratio: str, dense: Path, task: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One report, from the disk if it is there."""
    folder: Path = arguments.output / dense.name / f"{method.replace(' ', '-')}-{ratio}"
    if not (folder / "report.json").exists():
        pl.seed_everything(0, verbose=False)
        calibration = Calibration(max_samples=arguments.samples)
        module = SequenceClassification(
            arguments.pretrained,
            init_from=str(dense / "checkpoints" / "last.ckpt"),
            strategy=METHODS[method](float(ratio), calibration),
        )
        trainer = LowRankTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        trainer.compress(module, data_of(task, arguments), output=str(folder))
        (folder / "model.ckpt").unlink()  # hundreds of megabytes each; the report is what counts
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


def main() -> None:
    """Runs the grid and writes untuned.md and untuned.json."""
    options = parser(
        __doc__,
        "max_train_samples",
        "pretrained",
        glue="glue",
        output=Path("logs/untuned_grid"),
        ratios=["0.5", "0.33", "0.2", "0.1", "0.05"],
        methods=METHODS,
    )
    options.add_argument("--dense", nargs="+", required=True, metavar="FOLDER:TASK")
    options.add_argument("--samples", type=int, default=2048, help="calibration samples")
    arguments = read(options)
    rows: list[dict[str, Any]] = []
    for given in arguments.dense:
        folder, _, task = given.rpartition(":")
        for method in arguments.methods:
            for ratio in arguments.ratios:
                report = compress(method, ratio, Path(folder), task, arguments)
                rows.append({"dense": Path(folder).name, "method": method, "ratio": ratio, "report": report})
                print(told(rows[-1]), flush=True)
    lines = header("model", "method", "keep_ratio", "score", "share of dense", "metrics", "dense")
    write(arguments.output, "untuned", [*lines, *map(told, rows)], rows)


def told(row: dict[str, Any]) -> str:
    """One row of the table."""
    report = row["report"]
    score, dense = report["score"], report["score_dense"]
    scores = f"{score:.4f}", f"{score / dense:.1%}", describe(report, 4), f"{dense:.4f}"
    return line(row["dense"], row["method"], row["ratio"], *scores)


if __name__ == "__main__":
    main()
