"""A command's folder keeps to the same rules before its work and after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_pl.errors.outputs import OutputExistsError, OutputNotWritableError
from lowrank_pl.files import OutputFolder, replace_text


@pytest.fixture
def full(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    return folder


@pytest.mark.parametrize(
    ("overwrite", "remedy", "told", "untold"),
    [
        (None, None, "move the folder away", "--overwrite"),
        (False, None, "--overwrite true", "move the folder"),
        (None, "Go on with --resume true.", "Go on with --resume true.", "--overwrite"),
    ],
)
def test_a_folder_with_content_is_refused_with_what_the_command_offers(
    full: Path, overwrite: bool | None, remedy: str | None, told: str, untold: str
) -> None:
    folder = OutputFolder(full, overwrite, remedy)
    with pytest.raises(OutputExistsError, match=told) as before:
        folder.check()
    with pytest.raises(OutputExistsError, match=told) as after, folder.written_whole():
        pass
    assert str(before.value) == str(after.value)
    assert untold not in str(before.value)
    assert [file.name for file in full.iterdir()] == ["old.txt"]


def test_a_folder_with_content_is_replaced_if_asked(full: Path) -> None:
    folder = OutputFolder(full, overwrite=True)
    folder.check()
    with folder.written_whole() as part:
        (part / "new.txt").write_text("new")
    assert [file.name for file in full.iterdir()] == ["new.txt"]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert OutputFolder("~/out").begun() == tmp_path / "out"
    assert (tmp_path / "out").is_dir()


def test_a_folder_that_grows_keeps_what_is_there(full: Path) -> None:
    assert OutputFolder(full).begun() == full
    assert (full / "old.txt").read_text() == "old"
    with pytest.raises(OutputNotWritableError, match=r"old\.txt"):
        OutputFolder(full / "old.txt" / "inner").begun()


def test_a_text_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    assert replace_text(path, "first").read_text(encoding="utf-8") == "first"

    def refuse(*_: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="no space"):
            replace_text(path, "second")
    assert path.read_text(encoding="utf-8") == "first"
    assert list(tmp_path.iterdir()) == [path]
    assert replace_text(path, "third").read_text(encoding="utf-8") == "third"
