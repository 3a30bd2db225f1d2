"""The configuration beside a run, and runs that have no folder or that of another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_pl.cli import main
from lowrank_pl.errors.outputs import RunFolderInUseError
from lowrank_pl.errors.parallelism import StartMethodError
from tests.support.tables import write_sst2

BASE = Path(__file__).parents[2] / "configs" / "recipes" / "glue_svd.yaml"


@pytest.fixture
def arguments(tmp_path: Path, tiny_bert: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run in a working folder of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return [
        *("--config", str(BASE)),
        f"--model.init_args.pretrained={tiny_bert}",
        "--data.init_args.task=SST-2",
        f"--data.init_args.path={write_sst2(tmp_path / 'SST-2', rows=8)}",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks=null",
    ]


def test_without_a_logger_no_verb_writes_into_the_working_folder(arguments: list[str], tmp_path: Path) -> None:
    quiet = [*arguments, "--trainer.logger=false"]
    main(["diagnose", *quiet, f"--output={tmp_path / 'diagnosis'}"])
    main(["compress", *quiet, f"--output={tmp_path / 'small'}"])
    for verb in ("validate", "test", "predict"):
        main([verb, *quiet, f"--ckpt_path={tmp_path / 'small' / 'model.ckpt'}"])
    main(["fit", *quiet, "--trainer.max_steps=1", "--trainer.enable_checkpointing=false"])
    assert list(Path.cwd().iterdir()) == []  # so that a second run has nothing of the first to stumble over


def test_a_root_that_was_given_takes_the_place_of_a_logger(arguments: list[str], tmp_path: Path) -> None:
    root = tmp_path / "root"
    main(["validate", *arguments, "--trainer.logger=false", f"--trainer.default_root_dir={root}"])
    assert (root / "config.yaml").exists()
    assert list(Path.cwd().iterdir()) == []


def test_the_folder_of_another_run_is_refused_and_left_alone(arguments: list[str], tmp_path: Path) -> None:
    again = ["validate", *arguments, "--trainer.logger.init_args.version=mine"]
    main(again)
    folder = Path("logs") / "runs" / "mine"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(RunFolderInUseError, match="mine"):
        main(again)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook", "ddp_spawn"])
def test_processes_that_lose_the_model_are_refused_before_anything(strategy: str, arguments: list[str]) -> None:
    with pytest.raises(StartMethodError, match="devices to 1"):
        main(["fit", *arguments, f"--trainer.strategy={strategy}", "--trainer.devices=2"])
    assert list(Path.cwd().iterdir()) == []
