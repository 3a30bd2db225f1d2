"""The Trainer that knows the verbs of compression."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from lowrank_pl.allocation.uniform import check_share
from lowrank_pl.errors.run import (
    CalibrationError,
    MissingArgumentError,
    NotFactorisedError,
    NothingToCompressError,
    NothingToScoreError,
    OutputExistsError,
    OutputNotWritableError,
)
from lowrank_pl.monitoring.diagnosis_report import diagnosis_table, write_diagnosis
from lowrank_pl.monitoring.rank_dashboard import RankDashboard
from lowrank_pl.monitoring.rank_picture import save_rank_picture
from lowrank_pl.monitoring.report import build_report, layer_records, write_report
from lowrank_pl.strategies import NoCompression
from lowrank_pl.surgery import read_layout
from lowrank_pl.tasks import EncoderTask
from lowrank_pl.tasks.saved import CHECKPOINT_NAME
from lowrank_pl.trainer.compressor import Compressor
from lowrank_pl.trainer.diagnoser import Diagnoser
from lowrank_pl.trainer.inspection import inspect_model

logger = logging.getLogger(__name__)


class LowRankTrainer(pl.Trainer):
    """`lightning.pytorch.Trainer` with `compress`, `diagnose` and `inspect`; the arguments are Lightning's."""

    callbacks: list[pl.Callback]

    def compress(
        self,
        model: EncoderTask,
        datamodule: pl.LightningDataModule | None = None,
        output: str | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Factorises a model without training it, and scores it before and after.

        The model is scored, calibrated on the training split where the method needs it, factorised and scored
        again. The original stays untouched.

        Args:
            model: The task, with a static strategy; its weights come from `init_from` (or `pretrained`).
            datamodule: Data for calibration and the scores (validation split).
            output: Folder for `model.ckpt`, `report.json`, `report.md` and `ranks.png`; must be new or empty.
            ckpt_path: Take the weights from this Lightning checkpoint instead of `init_from`.

        Raises:
            OutputExistsError: the folder holds something already.
        """
        if datamodule is None:
            raise CalibrationError("compress", "no datamodule was given")
        if isinstance(model.strategy, NoCompression):
            raise NothingToCompressError(type(model.strategy).__name__)
        if getattr(self, "limit_val_batches", 1) == 0:
            raise NothingToScoreError
        with _new_folder(output) as folder:
            self._compress(model, datamodule, folder, ckpt_path)

    def _compress(
        self, model: EncoderTask, datamodule: pl.LightningDataModule, folder: Path, ckpt_path: str | None
    ) -> None:
        started = time.monotonic()
        compressor = Compressor()
        dense = self._validate_with(compressor, model, datamodule, ckpt_path)
        compressor.armed = True
        scores = self._validate_with(compressor, model, datamodule, None)
        if not compressor.done:
            raise NothingToScoreError
        _check_factorised(model)
        # validate() leaves the trainer without a verb, and a checkpoint wants one.
        self.state.fn = TrainerFn.VALIDATING
        self.save_checkpoint(folder / CHECKPOINT_NAME, weights_only=True)
        if self.is_global_zero:
            extra = {"score_dense": dense.get("val/score"), "metrics_dense": dense, "checkpoint": CHECKPOINT_NAME}
            report = build_report(model, "compress", "val", scores, time.monotonic() - started, **extra)
            write_report(report, folder)
            save_rank_picture(layer_records(model), folder / "ranks.png")
            RankDashboard.log_ranks(self, model)
            kept, total = report["parameters"]["total"], report["parameters"]["total_dense"]
            print(
                f"{report['task']} {report['metric']}: {dense.get('val/score', float('nan')):.4f} before, "
                f"{scores.get('val/score', float('nan')):.4f} after {report['method']}; "
                f"{kept:,} of {total:,} parameters; written to {folder}"
            )

    def diagnose(
        self,
        model: EncoderTask,
        datamodule: pl.LightningDataModule | None = None,
        output: str | None = None,
        keep_ratio: float = 0.33,
        ckpt_path: str | None = None,
    ) -> None:
        """Tells per layer how its importance is spread, which method suits it, and what that gains.

        Measures the full Fisher information of every targeted layer on the training split, tries every method at a
        budget, and changes nothing.

        Args:
            model: The task, fine-tuned; its weights come from `init_from` (or `pretrained`). The strategy's `targets`
                and `calibration` are used.
            datamodule: Data for calibration.
            output: Folder for `diagnosis.json`, `diagnosis.md` and `diagnosis.png`; must be new or empty.
            keep_ratio: The budget at which methods are compared, `0 < keep_ratio <= 1`.
            ckpt_path: Take the weights from this Lightning checkpoint instead of `init_from`.

        Raises:
            OutputExistsError: the folder holds something already.
        """
        if datamodule is None:
            raise CalibrationError("diagnose", "no datamodule was given")
        check_share(keep_ratio, None, 1)
        if getattr(self, "limit_val_batches", 1) == 0:
            raise NothingToScoreError
        with _new_folder(output) as folder:
            diagnoser = Diagnoser(keep_ratio)
            dense = self._validate_with(diagnoser, model, datamodule, ckpt_path)
            if self.is_global_zero:
                told = {"keep_ratio": keep_ratio, "calibration_samples": diagnoser.samples, "metrics": dense}
                write_diagnosis(diagnoser.found, diagnoser.ranks, folder, **told)
                print(diagnosis_table(diagnoser.found, diagnoser.ranks))
                print(f"written to {folder}")

    def _validate_with(
        self, callback: pl.Callback, model: EncoderTask, datamodule: pl.LightningDataModule, ckpt_path: str | None
    ) -> dict[str, float]:
        """One validation run with a further callback; returns its scores."""
        self.callbacks = [*self.callbacks, callback]
        try:
            return _scores(self.validate(model, datamodule, ckpt_path=ckpt_path, verbose=False))
        finally:
            # Lightning makes a new list on the way, when it adds the module's callbacks.
            self.callbacks = [other for other in self.callbacks if other is not callback]

    def inspect(self, model: EncoderTask, datamodule: pl.LightningDataModule | None = None) -> None:
        """Shows what can be factorised and what the configured budget would give; no training, no data.

        Args:
            model: The task; its encoder is built, nothing is written.
            datamodule: Not used.
        """
        del datamodule
        if not model.is_built:
            model.build()
        print(inspect_model(model))


@contextmanager
def _new_folder(output: str | None) -> Iterator[Path]:
    """Makes an output folder; one that a failed run leaves empty is removed again."""
    if output is None:
        raise MissingArgumentError("--output", "Name a new folder for the compressed model and its report.")
    folder = Path(output).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(str(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputNotWritableError(str(folder), str(error)) from error
    try:
        yield folder
    finally:
        with suppress(OSError):  # not empty: the run has succeeded
            folder.rmdir()


def _scores(results: object) -> dict[str, float]:
    return {k: float(v) for result in results for k, v in result.items()} if isinstance(results, list) else {}


def _check_factorised(model: EncoderTask) -> None:
    """Raises `NotFactorisedError` if a layer that the record calls factorised is not."""
    layout = read_layout(model.encoder).modules
    layers = model.compression.layers if model.compression is not None else ()
    if missing := [layer.name for layer in layers if layer.kind == "low_rank" and layer.name not in layout]:
        raise NotFactorisedError(type(model.strategy).__name__, missing)
