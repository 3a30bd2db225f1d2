"""One folder per run, never another run's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lowrank_pl.errors.outputs import RunFolderInUseError
from lowrank_pl.monitoring import RunLogger, check_unused, run_folder
from tests.support.runs import make_trainer


def test_the_folder_is_the_first_loggers(tmp_path: Path) -> None:
    for logger in (TensorBoardLogger(tmp_path, "a", "b"), CSVLogger(tmp_path, "a", "b")):
        assert run_folder(make_trainer(tmp_path, logger=logger)) == tmp_path / "a" / "b"


def test_another_logger_gets_a_folder_by_name_and_version(tmp_path: Path) -> None:
    class Remote(DummyLogger):
        name, version, save_dir = "project", "x1", str(tmp_path)

    assert run_folder(make_trainer(tmp_path, logger=Remote())) == tmp_path / "project" / "x1"


def test_without_a_logger_the_root_is_taken_but_never_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_folder(make_trainer(tmp_path, logger=False)) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert run_folder(make_trainer(tmp_path, logger=False)) is None
    assert run_folder(make_trainer(tmp_path, logger=False, default_root_dir=None)) is None


def test_fast_dev_run_has_none(tmp_path: Path) -> None:
    assert run_folder(make_trainer(tmp_path, fast_dev_run=True)) is None


def test_a_version_that_is_taken_is_refused_and_a_free_one_is_not(tmp_path: Path) -> None:
    taken = tmp_path / "runs" / "mine"
    taken.mkdir(parents=True)
    trainer = make_trainer(tmp_path, logger=RunLogger(tmp_path, "runs", "mine"))
    check_unused(trainer)
    (taken / "config.yaml").touch()
    with pytest.raises(RunFolderInUseError, match="mine"):
        check_unused(trainer)
    check_unused(make_trainer(tmp_path, logger=RunLogger(tmp_path, "runs")))
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"mine"}


def test_two_loggers_that_saw_the_same_folder_get_two_versions(tmp_path: Path) -> None:
    first, second = RunLogger(tmp_path, "runs"), RunLogger(tmp_path, "runs")
    for logger in (first, second):
        # What both found when they looked at the same time.
        logger._get_next_version = lambda: 0  # type: ignore[method-assign]
    assert (first.version, second.version) == (0, 1)
    assert (first.version, second.version) == (0, 1)
    assert Path(second.log_dir) == tmp_path / "runs" / "version_1"


def test_versions_count_on_from_the_highest(tmp_path: Path) -> None:
    (tmp_path / "runs" / "version_6").mkdir(parents=True)
    assert RunLogger(tmp_path, "runs").version == 7
    assert RunLogger(tmp_path, "runs", "own").version == "own"


def test_loggers_that_count_at_once_get_a_folder_each(tmp_path: Path) -> None:
    def claim(_: int) -> object:
        return RunLogger(tmp_path, "runs").version

    with ThreadPoolExecutor(8) as pool:
        assert sorted(map(int, map(str, pool.map(claim, range(64))))) == list(range(64))
