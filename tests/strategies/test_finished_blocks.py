"""What is kept of finished blocks, and what damage does to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank_pl.errors.outputs import BlocksMismatchError, OutputNotWritableError
from lowrank_pl.strategies.finished_blocks import FinishedBlocks


def filled(folder: Path, blocks: int = 3) -> FinishedBlocks:
    """A folder with so many blocks of one layer."""
    made = FinishedBlocks(folder)
    made.begin({"model": "m", "keep_ratio": 0.5})
    for index in range(blocks):
        made.save(
            {f"layers.{index}.x": {"left.weight": torch.full((2, 1), index)}}, {f"layers.{index}.x": {"error": 0.5}}
        )
    return made


def test_blocks_come_back_in_their_order(tmp_path: Path) -> None:
    filled(tmp_path / "out.blocks")
    states, records = FinishedBlocks(tmp_path / "out.blocks").load()
    assert list(states) == list(records) == [f"layers.{index}.x" for index in range(3)]
    assert torch.equal(states["layers.2.x"]["left.weight"], torch.full((2, 1), 2))
    assert records["layers.1.x"] == {"error": 0.5}


def test_a_damaged_block_and_those_after_it_are_forgotten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = filled(tmp_path)
    damaged = tmp_path / "blocks" / "00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:20])
    assert list(kept.load()[0]) == ["layers.0.x"]
    assert f"{damaged} cannot be read" in caplog.text
    kept.save({"layers.1.x": {"left.weight": torch.ones(1)}}, {"layers.1.x": {}})
    assert list(kept.load()[0]) == ["layers.0.x", "layers.1.x"]


def test_moments_are_there_until_they_are_dropped(tmp_path: Path) -> None:
    for kept in (FinishedBlocks(None), FinishedBlocks(None, on_disk=True), FinishedBlocks(tmp_path / "kept")):
        kept.put_moment("layers.0.x", torch.eye(3))
        found = kept.moment("layers.0.x")
        assert found is not None
        assert torch.equal(found, torch.eye(3))
        kept.drop_moments(["layers.0.x", "layers.1.x"])
        assert not kept.has_moment("layers.0.x")
        assert kept.moment("layers.0.x") is None
        kept.close()
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_kept_nothing_does_not_stand_in_the_way(tmp_path: Path) -> None:
    first = filled(tmp_path / "kept", blocks=0)
    first.put_moment("x", torch.eye(2))
    second = FinishedBlocks(tmp_path / "kept")
    second.begin({"model": "other"})
    assert not second.has_moment("x")
    second.save_measured({"x": torch.ones(2)}, {})
    with pytest.raises(BlocksMismatchError, match="another model"):
        first.begin({"model": "m"})
    second.begin({"model": "other"})
    (tmp_path / "killed").mkdir()  # as it wrote its first file
    (tmp_path / "killed" / ".run.safetensors.8f9e").write_text("")
    killed = FinishedBlocks(tmp_path / "killed")
    killed.begin({"model": "m"})
    assert not killed.is_begun
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "moments").mkdir()
    with pytest.raises(BlocksMismatchError):
        FinishedBlocks(tmp_path / "own").begin({"model": "m"})


def test_without_a_folder_nothing_else_is_kept() -> None:
    kept = FinishedBlocks(None)
    kept.begin({"model": "m"})
    kept.save_measured({"x": torch.ones(2)}, {})
    kept.save({"x": {"left.weight": torch.ones(2)}}, {"x": {}})
    assert kept.measured() is None
    assert kept.load() == ({}, {})


def test_the_first_thing_that_differs_is_told(tmp_path: Path) -> None:
    filled(tmp_path)
    FinishedBlocks(tmp_path).begin({"model": "m", "keep_ratio": 0.5})
    with pytest.raises(BlocksMismatchError, match=r"keep_ratio=0\.5, here it is 0\.25"):
        FinishedBlocks(tmp_path).begin({"model": "m", "keep_ratio": 0.25})
    with pytest.raises(BlocksMismatchError, match="labels=nothing"):
        FinishedBlocks(tmp_path).begin({"model": "m", "keep_ratio": 0.5, "labels": "sampled"})


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputNotWritableError):
        FinishedBlocks(tmp_path / "file" / "out.blocks").begin({"model": "m"})
