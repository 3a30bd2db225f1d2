"""The Trainer that knows the verbs of compression."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from lowrank_pl.allocation.uniform import check_share
from lowrank_pl.checkpoint import CHECKPOINT_NAME, is_quantized
from lowrank_pl.contract import KnowsItsLength
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.checkpoint import QuantizedModelError
from lowrank_pl.errors.outputs import OutputNotWritableError
from lowrank_pl.errors.run import CalibrationError, NothingToCompressError, NothingToScoreError
from lowrank_pl.files import OutputFolder
from lowrank_pl.monitoring.diagnosis_report import diagnosis_table, write_diagnosis
from lowrank_pl.monitoring.rank_dashboard import RankDashboard
from lowrank_pl.monitoring.rank_picture import save_rank_picture
from lowrank_pl.monitoring.report import build_report, layer_records, write_report
from lowrank_pl.strategies import CompressionStrategy, NoCompression, StaticStrategy
from lowrank_pl.strategies.any_module import check_factorised
from lowrank_pl.strategies.base import as_compressible, strategy_of
from lowrank_pl.strategies.processes import Agreement, shards
from lowrank_pl.tasks import EncoderTask
from lowrank_pl.tasks.before_data import check_plan, shapes_of
from lowrank_pl.trainer.agreed_stop import AgreedStop
from lowrank_pl.trainer.compressor import Compressor
from lowrank_pl.trainer.diagnoser import Diagnoser
from lowrank_pl.trainer.inspection import inspect_model

logger = logging.getLogger(__name__)

_DIAGNOSED_RATIO = 0.33


class LowRankTrainer(pl.Trainer):
    """`lightning.pytorch.Trainer` with `compress`, `diagnose` and `inspect`; the arguments are Lightning's.

    Attributes:
        progress: Where a `compress` that goes block by block, and has not come to its end, keeps what is finished.
    """

    callbacks: list[pl.Callback]
    progress: Path | None = None

    def compress(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        output: str | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Factorises a model without training it, and scores it before and after.

        The model is scored, calibrated on the training split where the method needs it, factorised and scored
        again. The original stays untouched. A method that works block by block keeps what is finished in
        `<output>.blocks` until the output is there; the same command goes on from it when it was stopped.

        Args:
            model: The task, with a static strategy; its weights come from `init_from` (or `pretrained`). Or any
                LightningModule with what `Compressible` says, whose strategy may stand among the trainer's callbacks.
            datamodule: Data for calibration and the scores (validation split).
            output: Folder for `model.ckpt`, `report.json`, `report.md` and `ranks.png`; must be new or empty.
            ckpt_path: Take the weights from this Lightning checkpoint instead of `init_from`.

        Raises:
            OutputExistsError: the folder holds something already.
            BlocksMismatchError: `<output>.blocks` belongs to another run.
            NotCompressibleError: a module that is no task has no encoder.
        """
        if datamodule is None:
            raise CalibrationError("compress", "no datamodule was given")
        strategy = strategy_of(self, model)
        if strategy is None:
            raise MissingArgumentError("a strategy", "Give the module one, or name it in Trainer(callbacks=[…]).")
        if isinstance(strategy, NoCompression):
            raise NothingToCompressError(type(strategy).__name__)
        if getattr(self, "limit_val_batches", 1) == 0:
            raise NothingToScoreError
        folder = self._new_folder(output)
        if isinstance(model, EncoderTask):
            check_plan(model, strategy.check, ckpt_path)
        started = time.monotonic()
        compressor = Compressor(strategy)
        progress = folder.beside("blocks") if strategy.keeps_progress else None
        strategy.progress_folder = self.progress = progress
        try:
            dense = self._validate_with(compressor, model, datamodule, ckpt_path)
            compressor.armed = True
            scores = self._validate_with(compressor, model, datamodule, None)
        finally:
            strategy.progress_folder = None
        if not compressor.done:
            raise NothingToScoreError
        module = as_compressible(model)
        check_factorised(module.encoder, module.compression)
        # validate() leaves the trainer without a verb, and a checkpoint wants one.
        self.state.fn = TrainerFn.VALIDATING
        if not self.is_global_zero:
            self.save_checkpoint(folder.path / CHECKPOINT_NAME, weights_only=True)  # takes part, and writes nothing
            return
        extra = {"score_dense": dense.get("val/score"), "metrics_dense": dense, "checkpoint": CHECKPOINT_NAME}
        report = build_report(model, "compress", "val", scores, time.monotonic() - started, **extra)
        self._write_compressed(model, report, folder)
        self.progress = None
        if progress is not None:
            shutil.rmtree(progress, ignore_errors=True)
        RankDashboard.log_ranks(self, model)
        kept, total = report["parameters"]["total"], report["parameters"]["total_dense"]
        score = (
            "val/score" if "val/score" in scores else next(iter(scores), "val/score")
        )  # a module may log what it likes
        name = score if report["metric"] is None else report["metric"]
        print(
            f"{report['task']} {name}: {dense.get(score, float('nan')):.4f} before, "
            f"{scores.get(score, float('nan')):.4f} after {report['method']}; "
            f"{kept:,} of {total:,} parameters; written to {folder.path}"
        )

    def _write_compressed(self, model: pl.LightningModule, report: dict[str, Any], folder: OutputFolder) -> None:
        """What `compress` leaves, by the first process; where it cannot write, the others do not wait for it."""
        saved = False
        try:
            with folder.written_whole() as part:
                self.save_checkpoint(part / CHECKPOINT_NAME, weights_only=True)
                saved = True
                write_report(report, part)
                save_rank_picture(layer_records(model), part / "ranks.png")
        except OutputNotWritableError:
            if not saved:
                self.strategy.barrier()
            raise

    def _run(self, model: pl.LightningModule, ckpt_path: Any = None, weights_only: bool | None = None) -> Any:
        AgreedStop(self).install()
        # Lightning's only place, and a private one, that knows the checkpoint before the data are prepared. Without it
        # (a plain Trainer) data without labels have to be given to a model that has been loaded.
        late = self.strategy.restore_checkpoint_after_setup and not shards(self.strategy)
        if not isinstance(model, EncoderTask) or ckpt_path is None or late:
            return super()._run(model, ckpt_path, weights_only)
        model.expect_checkpoint(str(ckpt_path))
        try:
            return super()._run(model, ckpt_path, weights_only)
        finally:
            model.expect_checkpoint(None)

    def _new_folder(self, output: str | None) -> OutputFolder:
        """The folder to write, which the first process looks at before any work is done."""
        if output is None:
            raise MissingArgumentError("--output", "Name a new folder for what the run leaves.")
        folder = OutputFolder(output)
        if self.is_global_zero:
            folder.check()
        return folder

    def diagnose(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        output: str | None = None,
        keep_ratio: float | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Tells per layer how its importance is spread, which method suits it, and what that gains.

        Measures the Fisher information and the second moments of every targeted layer on the training split, tries
        every method at a budget, compares them by the second-order rise of the loss, and changes nothing. It also tells
        how much of the energy of the Kronecker metric the ranks lose, and which ranks KroneckerSVD would choose.

        Args:
            model: The task, fine-tuned; its weights come from `init_from` (or `pretrained`). Or any LightningModule
                with what `Compressible` says. The strategy's `targets` and `calibration` are used.
            datamodule: Data for calibration.
            output: Folder for `diagnosis.json`, `diagnosis.md` and `diagnosis.png`; must be new or empty.
            keep_ratio: The budget at which methods are compared, `0 < keep_ratio <= 1`; by default that of a static
                strategy, else 0.33.
            ckpt_path: Take the weights from this Lightning checkpoint instead of `init_from`.

        Raises:
            OutputExistsError: the folder holds something already.
        """
        if datamodule is None:
            raise CalibrationError("diagnose", "no datamodule was given")
        strategy = strategy_of(self, model) or NoCompression()
        ratio, source = _ratio_to_diagnose(strategy, keep_ratio)
        check_share(ratio, None, 1)
        if getattr(self, "limit_val_batches", 1) == 0:
            raise NothingToScoreError
        folder = self._new_folder(output)
        diagnoser = Diagnoser(ratio, strategy)
        if isinstance(model, EncoderTask):
            check_plan(model, diagnoser.allocate, ckpt_path)
        dense = self._validate_with(diagnoser, model, datamodule, ckpt_path)
        with Agreement(self):
            if self.is_global_zero:
                told = {"keep_ratio": ratio, "keep_ratio_from": source, "calibration_samples": diagnoser.samples}
                with folder.written_whole() as part:
                    told |= {"energy_lost": diagnoser.energy_lost, "metrics": dense}
                    write_diagnosis(diagnoser.found, diagnoser.ranks, part, diagnoser.global_ranks, **told)
                print(diagnosis_table(diagnoser.found, diagnoser.ranks, diagnoser.global_ranks))
                print(_told_of_energy(diagnoser.energy_lost))
                print(f"methods compared at keep_ratio {ratio:g} ({source}); written to {folder.path}")

    def _validate_with(
        self,
        callback: pl.Callback,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule,
        ckpt_path: str | None,
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
            model: The task; its encoder is built, nothing is written. Of a folder with a configuration and no weights
                the shapes are looked at.
            datamodule: Tells how long samples are, for the memory of methods that know it; no data are read.

        Raises:
            MaxLengthError: the data's samples may be longer than the model has positions.
            LowRankError: the strategy's plan is impossible for this model. The table is printed before all of them.
        """
        encoder = shapes_of(model)
        if encoder is None:
            if not model.is_built:
                model.build()
            encoder = model.encoder
        print(inspect_model(encoder, model.strategy))
        if isinstance(datamodule, KnowsItsLength) and (config := getattr(encoder, "config", None)) is not None:
            datamodule.check_positions(config, model.init_from or model.pretrained)
        if is_quantized(encoder):
            if not isinstance(model.strategy, NoCompression):
                raise QuantizedModelError(str(model.init_from), f"a plan of {type(model.strategy).__name__}")
            return
        model.strategy.plan(encoder)
        tokens = getattr(datamodule, "max_length", None)
        item = {"16-true": 2, "bf16-true": 2, "64-true": 8}.get(str(self.precision), 4)
        for line in model.strategy.told_beforehand(encoder, item, tokens):
            print(line)


def _ratio_to_diagnose(strategy: CompressionStrategy, asked: float | None) -> tuple[float, str]:
    """The budget at which methods are compared, and where it comes from."""
    if asked is not None:
        return asked, "as asked"
    configured = strategy.keep_ratio if isinstance(strategy, StaticStrategy) else None
    return (_DIAGNOSED_RATIO, "by default") if configured is None else (configured, "the strategy's")


def _told_of_energy(lost: dict[str, float]) -> str:
    return (
        f"KroneckerSVD: uniform ranks lose {lost['uniform']:.1%} of the energy of all layers, "
        f"Global ranks of the same budget {lost['global']:.1%}"
    )


def _scores(results: object) -> dict[str, float]:
    return {k: float(v) for result in results for k, v in result.items()} if isinstance(results, list) else {}
