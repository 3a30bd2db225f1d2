"""`SHA256SUMS`: written as `sha256sum` writes it, and any single flipped bit is found."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lowrank_pl.errors.checkpoint import DamagedWeightsError, NotACheckpointError
from lowrank_pl.files.checksums import CHECKSUMS, verify_checksums, write_checksums

NAME = "model.safetensors"
# The digest of "abc", the first example of FIPS 180.
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the three bytes `abc` as weights."""
    (tmp_path / NAME).write_bytes(b"abc")
    return tmp_path


def test_the_format(folder: Path) -> None:
    for name in ("config.json", "notes.txt", "adapter.safetensors", "pytorch_model.bin"):
        (folder / name).write_text(name)
    write_checksums(folder)
    assert (folder / CHECKSUMS).read_bytes() == f"{ABC}  {NAME}\n".encode()
    verify_checksums(folder, [NAME])


def test_shards_and_their_index_are_listed(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    for name in names:
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    assert [line.split("  ")[1] for line in (tmp_path / CHECKSUMS).read_text().splitlines()] == names
    for name in names:
        (tmp_path / name).write_text("another")
        with pytest.raises(DamagedWeightsError, match=name):
            verify_checksums(tmp_path, names)
        (tmp_path / name).write_text(name)
    verify_checksums(tmp_path, names)


@pytest.mark.parametrize("bit", range(24))
def test_every_single_bit_counts(folder: Path, bit: int) -> None:
    write_checksums(folder)
    content = bytearray(b"abc")
    content[bit // 8] ^= 1 << bit % 8
    (folder / NAME).write_bytes(content)
    with pytest.raises(DamagedWeightsError, match=r"model\.safetensors' is damaged or was replaced since the export"):
        verify_checksums(folder, [NAME])


def test_large_files_count_to_their_last_byte(folder: Path) -> None:
    content = bytearray(3_000_000)
    (folder / NAME).write_bytes(content)
    write_checksums(folder)
    verify_checksums(folder, [NAME])
    content[-1] = 1
    (folder / NAME).write_bytes(content)
    with pytest.raises(DamagedWeightsError):
        verify_checksums(folder, [NAME])


@pytest.mark.parametrize(
    "content",
    [
        f"{ABC}  {NAME}",
        f"{ABC} *{NAME}\n",
        f"{ABC.upper()}  {NAME}\r\n",
        f"# mine\n{ABC}  {NAME}\n{'0' * 64}  README.md\nnothing\n",
    ],
    ids=["no newline", "binary mode", "written elsewhere", "further lines"],
)
def test_what_tools_and_users_write_is_understood(folder: Path, content: str) -> None:
    (folder / CHECKSUMS).write_bytes(content.encode())
    verify_checksums(folder, [NAME])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (f"{'0' * 64}  {NAME}\n", "lists 000000000000…"),
        (f"{ABC}  model.safetensor\n", "does not list it"),
        (f"{ABC[:-1]}  {NAME}\n", "does not list it"),
        (f"{ABC[:-1]}\xe4  {NAME}\n", "does not list it"),
        ("", "does not list it"),
    ],
)
def test_checksums_that_are_damaged_themselves(folder: Path, content: str, problem: str) -> None:
    (folder / CHECKSUMS).write_bytes(content.encode("latin1"))
    with pytest.raises(NotACheckpointError, match=problem):
        verify_checksums(folder, [NAME])


def test_a_folder_without_checksums_passes(folder: Path) -> None:
    verify_checksums(folder, [NAME])


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum here")
def test_sha256sum_agrees(folder: Path) -> None:
    write_checksums(folder)
    command = ["sha256sum", "-c", "--strict", CHECKSUMS]
    good = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert good.stdout == f"{NAME}: OK\n"
    (folder / NAME).write_bytes(b"abb")
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 1
    written = subprocess.run(["sha256sum", NAME], cwd=folder, capture_output=True, text=True, check=True)
    (folder / CHECKSUMS).write_text(written.stdout)
    verify_checksums(folder, [NAME])
