"""What is flushed to the disk, and when: nothing gets its final name before its content has arrived."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowrank_pl.errors.outputs import OutputNotWritableError
from lowrank_pl.files.atomic import all_or_nothing
from lowrank_pl.files.durable import flush


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were flushed, in order, each as it was called then."""
    found: list[str] = []

    def fsync(descriptor: int) -> None:
        found.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    if not Path("/proc/self/fd").exists():
        pytest.skip("the system does not tell what a descriptor belongs to")
    monkeypatch.setattr(os, "fsync", fsync)
    return found


def write(part: Path) -> None:
    (part / "sub").mkdir()
    for name in ("a", "sub/b"):
        (part / name).write_text(name, encoding="utf-8")


def test_files_are_flushed_before_the_folders_that_list_them(tmp_path: Path, flushed: list[str]) -> None:
    write(tmp_path)
    flush(tmp_path)
    where = str(tmp_path.resolve())
    assert flushed == [f"{where}/sub/b", f"{where}/sub", f"{where}/a", where]


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_gets_its_name_once_its_content_is_on_the_disk(
    tmp_path: Path, flushed: list[str], there: bool
) -> None:
    output = tmp_path.resolve() / "out"
    if there:
        output.mkdir()
        (output / "old").touch()
    with all_or_nothing(output, overwrite=True) as part:
        write(part)
    assert sorted(path.name for path in output.iterdir()) == ["a", "sub"]
    content, names = flushed[:4], flushed[4:]
    assert content == [f"{part}/sub/b", f"{part}/sub", f"{part}/a", str(part)]
    assert names == [str(tmp_path.resolve())]


def test_content_that_does_not_arrive_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputNotWritableError, match="No space left"), all_or_nothing(tmp_path / "out", False) as part:
        write(part)
    assert not list(tmp_path.iterdir())
