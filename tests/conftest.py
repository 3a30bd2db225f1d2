"""Fixtures for every package, and the order of the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.tiny import save_tiny_model

# Files that take long start first, so that no worker is left with one at the end.
LONG = (
    "tests/test_two_processes.py",
    "tests/export/test_onnx_file.py",
    "tests/test_cli.py",
    "tests/strategies/test_rankdyna.py",
    "tests/strategies/test_contract.py",
    "tests/export/test_load_ways.py",
    "tests/strategies/test_kronecker_svd.py",
    "tests/export/test_export.py",
    "tests/strategies/test_lightning_features.py",
    "tests/strategies/test_averaging.py",
    "tests/strategies/test_lifecycle.py",
    "tests/export/test_killed.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves long files to the front; the order within a file stays."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(LONG)))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("LOWRANK_PL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random BERT and its tokenizer."""
    return str(save_tiny_model("bert", tmp_path_factory.mktemp("models") / "bert"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs a CUDA device where there is none."""
    if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
