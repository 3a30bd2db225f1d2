"""Fixtures for every package, and the order of the files."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.forks import Forks
from tests.support.tiny import save_tiny_model

# Files that take long start first, so that no worker is left with one at the end.
LONG = (
    "tests/export/test_onnx_families.py",
    "tests/test_two_processes.py",
    "tests/test_cli.py",
    "tests/strategies/test_contract.py",
    "tests/strategies/test_lightning_features.py",
    "tests/strategies/test_rankdyna.py",
    "tests/export/test_onnx_file.py",
    "tests/strategies/test_kronecker_svd.py",
    "tests/export/test_load_ways.py",
    "tests/strategies/test_averaging.py",
    "tests/trainer/test_trainer.py",
    "tests/strategies/test_lifecycle.py",
    "tests/export/test_int8.py",
    "tests/export/test_damage.py",
    "tests/test_readme.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves long files to the front; the order within a file stays."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(LONG)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs a CUDA device where there is none, and seeds: the order of the tests changes no number."""
    if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    # Those of one test are others than those of the next.
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("LOWRANK_PL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random BERT and its tokenizer."""
    return str(save_tiny_model("bert", tmp_path_factory.mktemp("models") / "bert"))


@pytest.fixture(scope="session")
def flat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A factorised classifier of one layer and its checkpoint: tracing takes seconds a layer, and all are the same."""
    from tests.export.test_export import checkpoint  # which loads much that most tests do without

    folder = tmp_path_factory.mktemp("flat")
    task = checkpoint(str(save_tiny_model("bert", folder / "bert", layers=1)), folder / "model.ckpt")
    return task.encoder, str(folder / "model.ckpt")


@pytest.fixture(scope="session")
def _onnx_once(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.support.onnx_once import OnnxOnce

    return OnnxOnce(tmp_path_factory.mktemp("onnx"))


@pytest.fixture
def onnx_once(_onnx_once: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """ONNX exports of a model that has been exported already take what was written then: `OnnxOnce`."""
    monkeypatch.setattr("lowrank_pl.export.onnx_file._program", _onnx_once)
    return _onnx_once


def _forks(scratch: Path, modules: list[str], environment: dict[str, str]) -> Iterator[Forks]:
    if not hasattr(os, "fork"):
        pytest.skip("needs a system that forks")
    forks = Forks(scratch, modules, environment)
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def everything_loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """New processes of this package, each as if it had just imported what the command line needs."""
    modules = ["lowrank_pl.cli.commands", "lowrank_pl.export", "tests.support.runs", "tests.support.tiny"]
    yield from _forks(tmp_path_factory.mktemp("forks"), modules, {"PYTHONHASHSEED": "1"})


@pytest.fixture(scope="session")
def transformers_loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """New processes that have imported what loads a model, and nothing of this package."""
    modules = ["torch", "transformers.models.auto.modeling_auto", "transformers.models.bert.modeling_bert"]
    scratch = tmp_path_factory.mktemp("forks")
    yield from _forks(scratch, modules, {"PYTHONHASHSEED": "2", "HF_HOME": str(scratch / "hf"), "HF_HUB_OFFLINE": "1"})
