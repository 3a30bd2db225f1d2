"""Tensors in one file: whole or absent, and no more of them than was given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lowrank_pl.files.tensors as tensors_module
from lowrank_pl.files.tensors import read_tensors, write_tensors


def test_what_is_written_is_read(tmp_path: Path) -> None:
    given = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64)}
    write_tensors(tmp_path / "new" / "file", given, {"word": "told"})
    found = read_tensors(tmp_path / "new" / "file")
    assert found is not None
    torch.testing.assert_close(found[0], given, rtol=0, atol=0)
    assert found[1] == {"word": "told"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_parts_of_one_tensor_are_written_as_parts(tmp_path: Path) -> None:
    whole = torch.arange(1000.0).view(10, 100)
    given = {"row": whole[3], "column": whole[:, 4], "turned": whole[:2, :3].mT}
    write_tensors(tmp_path / "file", given)
    found = read_tensors(tmp_path / "file")
    assert found is not None
    torch.testing.assert_close(found[0], given, rtol=0, atol=0)
    assert (tmp_path / "file").stat().st_size < 4 * whole.numel()


def test_a_tensor_with_memory_of_its_own_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, handed = torch.ones(3, 4), list[int]()

    def save(tensors: dict[str, torch.Tensor], path: Path, told: object) -> None:
        handed.append(tensors["a"].data_ptr())
        path.touch()

    monkeypatch.setattr(tensors_module, "save_file", save)
    write_tensors(tmp_path / "file", {"a": given})
    assert handed == [given.data_ptr()]


def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path / "file", {"a": torch.zeros(2)})

    def crash(tensors: object, path: Path, told: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(tensors_module, "save_file", crash)
    with pytest.raises(OSError, match="no space"):
        write_tensors(tmp_path / "file", {"a": torch.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    found = read_tensors(tmp_path / "file")
    assert found is not None
    assert not found[0]["a"].any()


@pytest.mark.parametrize("content", [None, b"half a file"])
def test_what_is_no_such_file_counts_as_absent(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    assert read_tensors(tmp_path / "file") is None
