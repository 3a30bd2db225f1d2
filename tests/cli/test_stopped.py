"""Runs that a signal stops: what they leave, what they say, and their exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lowrank_pl.cli import console
from lowrank_pl.strategies.finished_blocks import FinishedBlocks
from tests.cli.test_entry import RECIPE
from tests.data.samples import write_sst2


class Signals(pl.Callback):
    """Sends its own process a signal in the second epoch, after twelve batches, in a test, or `early`, before work."""

    def __init__(self, number: int, early: bool = False) -> None:
        self.number = number
        self.early = early
        self.validations = 0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validations += 1
        if self.early and self.validations == 2:  # compress has scored the dense model
            os.kill(os.getpid(), self.number)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        if trainer.current_epoch == 1 and trainer.global_step % 19 == 12:
            os.kill(os.getpid(), self.number)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        os.kill(os.getpid(), self.number)


@pytest.fixture
def words(tmp_path: Path, tiny_bert: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    data = [f"--data.init_args.path={write_sst2(tmp_path / 'SST-2')}", "--data.init_args.task=SST-2"]
    quick = ["--trainer.accelerator=cpu", "--trainer.max_epochs=4", "--trainer.enable_progress_bar=false"]
    return [f"--model.init_args.pretrained={tiny_bert}", *data, "--data.init_args.batch_size=2", *quick]


def run(
    verb: str, recipe: str, words: list[str], number: int, monkeypatch: pytest.MonkeyPatch, early: bool = False
) -> object:
    """The exit code."""
    stop = [f"--trainer.callbacks+={__name__}.Signals", f"--trainer.callbacks.number={number}"]
    stop += [f"--trainer.callbacks.early={early}"]
    config = ["--config", str(RECIPE.with_name(f"{recipe}.yaml"))]
    monkeypatch.setattr(sys, "argv", ["lowrank-pl", verb, *config, *words, *stop])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests beside it
    try:
        with pytest.raises(SystemExit) as left:
            console()
    finally:
        signal.signal(signal.SIGINT, before)
    return left.value.code


@pytest.mark.parametrize(("recipe", "number"), [("glue_rankdyna", signal.SIGTERM), ("glue_finetune", signal.SIGINT)])
def test_a_training_that_is_stopped_says_so_and_fails(
    recipe: str,
    number: int,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("fit", recipe, words, number, monkeypatch) == 128 + number
    folder, name = tmp_path / "logs" / "runs" / "version_0", signal.Signals(number).name
    report, last = json.loads((folder / "report.json").read_text()), folder / "checkpoints" / "last.ckpt"
    written = torch.load(last, weights_only=True)["global_step"]
    assert (report["stopped_by"], report["steps"], report["score_step"]) == (name, written + 12, written)
    assert report["score"] is not None
    assert report["notes"][-1] == f"the run was stopped by {name} after optimizer step {written + 12}"
    said = capsys.readouterr().err
    assert f"RunStoppedError: fit was stopped by {name} after optimizer step {written + 12}" in said
    assert f"with --ckpt_path={last.relative_to(tmp_path)} goes on" in said
    above = recipe == "glue_rankdyna"
    assert ("has not been reached" in said, "has not been reached" in report["notes"][0]) == (above, above)
    assert (folder / "rank_history.json").exists() == above
    # In training layers have as much room as when dense, whatever their rank.
    parameters = report["parameters"]
    assert parameters["total_dense"] == 25954
    assert parameters["total_dense"] - parameters["total"] == parameters["targeted_dense"] - parameters["targeted_kept"]
    assert (parameters["total"] < 25954) == above


def test_other_verbs_end_with_the_signals_code(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_by_one = [*words, "--data.init_args.eval_batch_size=1"]
    assert run("test", "glue_finetune", one_by_one, signal.SIGTERM, monkeypatch) == 143
    assert "RunStoppedError: test was stopped by SIGTERM before its end" in capsys.readouterr().err


def test_a_compression_ends_before_its_next_batch(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWRANK_PL_CACHE", str(tmp_path / "cache"))
    assert run("compress", "glue_kronecker", [*words, "--output=small"], signal.SIGTERM, monkeypatch, early=True) == 143
    assert "RunStoppedError: compress was stopped by SIGTERM" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
    assert not (tmp_path / "cache" / "importance").exists()  # nothing was measured to its end


def test_a_compression_by_blocks_says_that_it_goes_on(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, saved = FinishedBlocks.save, []

    def stop_after_it(kept: FinishedBlocks, *block: Any) -> None:
        save(kept, *block)
        saved.append(block)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(FinishedBlocks, "save", stop_after_it)
    blocks = [*words, "--output=small", "--model.init_args.strategy.init_args.refit=false"]
    blocks += ["--model.init_args.strategy.init_args.sequential=true"]
    assert run("compress", "glue_kronecker", blocks, signal.SIGTERM, monkeypatch) == 143
    assert "'small.blocks' keeps what is finished: the same command goes on there" in capsys.readouterr().err
    assert len(list((tmp_path / "small.blocks" / "blocks").iterdir())) == len(saved) > 0
