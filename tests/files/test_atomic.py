"""An output folder is there as a whole or not at all, and what stands in the way is told."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.outputs import OutputExistsError, OutputNotWritableError
from lowrank_pl.files import atomic
from lowrank_pl.files.atomic import all_or_nothing, check_output

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(output: Path, overwrite: bool = False, content: str = "new") -> None:
    with all_or_nothing(output, overwrite) as part:
        (part / "file.txt").write_text(content)


def fail(output: Path, error: Exception) -> None:
    with all_or_nothing(output, overwrite=True) as part:
        (part / "file.txt").write_text("half")
        raise error


@pytest.fixture(params=[True, False], ids=["in one step", "by renaming"])
def _both_exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with each way of letting folders change places."""
    if not request.param:
        monkeypatch.setattr(atomic, "_exchange_at_once", lambda new, old: False)


def old_folder(output: Path) -> None:
    (output / "sub").mkdir(parents=True)
    (output / "file.txt").write_text("old")
    (output / "sub" / "mine.txt").write_text("mine")


def is_old(output: Path) -> bool:
    return (output / "file.txt").read_text() == "old" and (output / "sub" / "mine.txt").read_text() == "mine"


def test_a_new_folder_and_its_parents(tmp_path: Path) -> None:
    with all_or_nothing(tmp_path / "a" / "b" / "out", overwrite=False) as part:
        (part / "file.txt").write_text("new")
        assert not (tmp_path / "a" / "b" / "out").exists()
        assert part.parent == tmp_path / "a" / "b"
        assert part.name.startswith(".out.")
    assert names(tmp_path / "a" / "b") == ["out"]
    assert names(tmp_path / "a" / "b" / "out") == ["file.txt"]


@pytest.mark.usefixtures("_both_exchanges")
def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    old_folder(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file.txt"]
    assert (tmp_path / "out" / "file.txt").read_text() == "new"


@pytest.mark.usefixtures("_both_exchanges")
def test_an_empty_folder_is_filled_unasked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert names(tmp_path / "out") == ["file.txt"]
    assert names(tmp_path) == ["out"]


@pytest.mark.usefixtures("_both_exchanges")
def test_a_link_stays_and_leads_to_the_new_folder(tmp_path: Path) -> None:
    old_folder(tmp_path / "disk" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk") == ["out"]
    assert names(tmp_path / "disk" / "out") == ["file.txt"]


def test_what_appears_meanwhile_is_replaced_only_if_asked(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError), all_or_nothing(tmp_path / "out", overwrite=False):
        old_folder(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert is_old(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with all_or_nothing(tmp_path / "out", overwrite=True):
        old_folder(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_in_its_place_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputExistsError, match="It is a file, in whose place no folder is put; give another --output"):
        check_output(tmp_path / "out", overwrite)
    with pytest.raises(OutputExistsError, match="It is a file, in whose place no folder is put; give another --output"):
        write(tmp_path / "out", overwrite)
    assert (tmp_path / "out").read_text() == "mine"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FULL, "No space left on device"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (Exception("No space left on device (os error 28)"), "No space left on device"),  # so does tokenizers
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
    ],
)
def test_an_error_while_writing_leaves_everything_as_it_was(tmp_path: Path, error: Exception, told: str) -> None:
    old_folder(tmp_path / "old")
    for output in (tmp_path / "old", tmp_path / "a" / "b" / "out"):
        message = rf"{output.name}' cannot be made \(.*{told}.*has room"
        with pytest.raises(OutputNotWritableError, match=message) as caught:
            fail(output, error)
        assert caught.value.__cause__ is error
    assert names(tmp_path) == ["old"]
    assert is_old(tmp_path / "old")


@pytest.mark.parametrize("error", [KeyError("a bug"), RangeError("x", 1, "2"), KeyboardInterrupt()])
def test_other_errors_pass_as_they_are(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, all_or_nothing(tmp_path / "a" / "out", overwrite=False):
        raise error
    assert caught.value is error
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_parent_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    made = Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name.startswith(".out."):
            made(self.parent, parents=True, exist_ok=True)  # as far as it comes
            raise OSError(code, os.strerror(code), str(self))
        made(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    for output in (tmp_path / "out", tmp_path / "a" / "out"):
        with pytest.raises(OutputNotWritableError, match=os.strerror(code)):
            write(output)
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["file/out", "file/a/out", "n" * 300])
def test_an_impossible_place(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputNotWritableError, match="cannot be made"):
        write(tmp_path / place)
    assert names(tmp_path) == ["file"]


def test_the_two_ways_of_changing_places_agree(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, content=name)
    if not atomic._exchange_at_once(tmp_path / "a", tmp_path / "b"):
        pytest.skip("the system cannot exchange two folders in one step")
    assert (tmp_path / "a" / "file.txt").read_text() == "b"
    assert (tmp_path / "b" / "file.txt").read_text() == "a"
    assert not atomic._exchange_at_once(tmp_path / "a", tmp_path / "missing")
    assert (tmp_path / "a" / "file.txt").read_text() == "b"


def test_an_error_between_the_renames_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_folder(tmp_path / "out")
    monkeypatch.setattr(atomic, "_exchange_at_once", lambda new, old: False)
    renamed = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise FULL
        return renamed(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputNotWritableError, match="No space left"):
        write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert is_old(tmp_path / "out")


@pytest.mark.parametrize("name", ["out", "o[u]t*?"])
def test_a_folder_left_aside_is_put_back_before_the_next_export(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    old_folder(tmp_path / f".{name}.0123abcd.aside")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        check_output(tmp_path / name, overwrite=False)
    assert is_old(tmp_path / name)
    assert "is put back" in caplog.text
    assert names(tmp_path) == [name]


def test_a_folder_left_aside_never_replaces_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old_folder(tmp_path / ".out.0123abcd.aside")
    write(tmp_path / "out")
    check_output(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "file.txt").read_text() == "new"
    assert is_old(tmp_path / ".out.0123abcd.aside")
    assert ".out.0123abcd.aside is left of a killed run" in caplog.text


def test_an_unfinished_folder_is_told_and_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (".out.0123abcd.part", ".other.0123abcd.part", ".out.part", "out.0123abcd.part"):
        (tmp_path / name).mkdir()
    with caplog.at_level(logging.WARNING):
        check_output(tmp_path / "out", overwrite=False)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/.out.0123abcd.part is left of a killed run: remove it, unless another to {tmp_path}/out is running"
    ]
    write(tmp_path / "out")
    assert len(names(tmp_path)) == 5


def test_files_follow_the_umask_whoever_wrote_them(tmp_path: Path) -> None:
    for umask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            with all_or_nothing(tmp_path / "out", overwrite=True) as part:
                (part / "sub").mkdir()
                save_file({"a": torch.zeros(2)}, part / "sub" / "a.safetensors")
                Path(tempfile.mkstemp(dir=part)[1]).rename(part / "b")
        finally:
            os.umask(before)
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
        assert modes == {"a.safetensors": mode, "b": mode}


@pytest.mark.parametrize("place", ["file/out", "n" * 300])
def test_what_cannot_be_made_is_told_before_any_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputNotWritableError, match="cannot be made"):
        check_output(tmp_path / place, overwrite=False)
    check_output(tmp_path / "a" / "b" / "out", overwrite=False)
    assert names(tmp_path) == ["file"]
