"""The weights of a folder are those that its index names, or its one file: never what happens to lie there too."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowrank_pl.errors.checkpoint import CheckpointMismatchError, NotACheckpointError
from lowrank_pl.files.weight_files import INDEX, SINGLE, WeightFiles, remove_superseded, weight_files

FIRST, SECOND, STALE = (f"model-0000{i}-of-0000{n}.safetensors" for i, n in ((1, 2), (2, 2), (3, 3)))


def write(folder: Path, name: str, **values: float) -> None:
    save_file({tensor: torch.tensor([value]) for tensor, value in values.items()}, folder / name)


def write_index(folder: Path, **places: str) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def sharded(folder: Path) -> None:
    write(folder, FIRST, a=1.0, b=2.0)
    write(folder, SECOND, c=3.0)
    write_index(folder, a=FIRST, b=FIRST, c=SECOND)


def values(folder: Path) -> dict[str, float]:
    files = weight_files(folder)
    files.check_index()
    return {name: float(tensor) for name, tensor in files.read().items()}


def test_one_file(tmp_path: Path) -> None:
    write(tmp_path, SINGLE, a=1.0, b=2.0)
    assert weight_files(tmp_path).names == [SINGLE]
    assert values(tmp_path) == {"a": 1.0, "b": 2.0}


def test_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert weight_files(tmp_path).names == [FIRST, SECOND, INDEX]
    assert values(tmp_path) == {"a": 1.0, "b": 2.0, "c": 3.0}


@pytest.mark.parametrize("stale", [STALE, "model.old.safetensors", "adapter.safetensors", "model-a.safetensors"])
def test_a_stale_file_is_not_read(tmp_path: Path, stale: str) -> None:
    write(tmp_path, SINGLE, a=1.0)
    write(tmp_path, stale, a=9.0, more=9.0)
    assert values(tmp_path) == {"a": 1.0}
    (tmp_path / SINGLE).unlink()
    sharded(tmp_path)
    assert values(tmp_path) == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_both_an_index_and_one_file_are_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    write(tmp_path, SINGLE, a=9.0, b=9.0, c=9.0)
    with pytest.raises(NotACheckpointError, match=r"has both model\.safetensors and .*; remove that one"):
        weight_files(tmp_path)


def test_an_index_of_the_one_file_is_not_ambiguous(tmp_path: Path) -> None:
    write(tmp_path, SINGLE, a=1.0)
    write_index(tmp_path, a=SINGLE)
    assert values(tmp_path) == {"a": 1.0}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / SECOND).unlink()
    with pytest.raises(NotACheckpointError, match=rf"names '{SECOND}', which is missing \(1 of 2 files are\)"):
        weight_files(tmp_path)


def test_shards_without_their_index_are_no_weights(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(NotACheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("null", "is damaged"),
        ("{}", "is damaged"),
        ('{"weight_map": ["a"]}', "is damaged"),
        ('{"weight_map": {"a": ["model-00001-of-00002.safetensors"]}}', "is damaged"),
        ('{"weight_map": {"a": 3}}', "names 3, no file beside it"),
        ('{"weight_map": {}}', "names no shard"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "no file beside it"),
        ('{"weight_map": {"a": "/other/model.safetensors"}}', "no file beside it"),
        ('{"weight_map": {"a": ".."}}', "missing"),
        ('{"weight_map": {"a": ""}}', "missing"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    sharded(tmp_path)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", SINGLE, a=1.0)
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(NotACheckpointError, match=problem):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("places", "problem"),
    [
        ({"a": FIRST, "c": SECOND}, "unexpected 'b'"),
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}, "missing 'd'"),
        ({"a": SECOND, "b": FIRST, "c": SECOND}, "unexpected 'a'"),
    ],
)
def test_index_and_shards_must_agree(tmp_path: Path, places: dict[str, str], problem: str) -> None:
    sharded(tmp_path)
    write_index(tmp_path, **places)
    with pytest.raises(CheckpointMismatchError, match=problem):
        weight_files(tmp_path).check_index()


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64])
@pytest.mark.parametrize("use", [WeightFiles.check_index, WeightFiles.read])
def test_an_unreadable_shard_is_named(tmp_path: Path, content: bytes, use: Callable[[WeightFiles], Any]) -> None:
    sharded(tmp_path)
    (tmp_path / SECOND).write_bytes(content)
    with pytest.raises(NotACheckpointError, match=f"{SECOND} is damaged"):
        use(weight_files(tmp_path))


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors.pkl", FIRST])
def test_a_pickle_is_never_unpickled(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "unpickled"
    pickled = pickle.dumps(Marker(marker))
    pickle.loads(pickled)
    assert marker.exists()  # the trap works
    marker.unlink()
    (tmp_path / name).write_bytes(pickled)
    if name == FIRST:
        write_index(tmp_path, a=FIRST)
    with pytest.raises(NotACheckpointError):
        values(tmp_path)
    assert not marker.exists()


def test_an_index_left_of_a_save_in_shards_is_removed(tmp_path: Path) -> None:
    write(tmp_path, SINGLE, a=1.0)
    write_index(tmp_path, a=FIRST, b=SECOND)
    remove_superseded(tmp_path)
    assert values(tmp_path) == {"a": 1.0}


def test_a_file_left_of_a_save_without_shards_is_removed(tmp_path: Path) -> None:
    write(tmp_path, SINGLE, a=9.0)
    sharded(tmp_path)
    remove_superseded(tmp_path)
    assert values(tmp_path) == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_where_nothing_is_superseded_nothing_is_removed(tmp_path: Path) -> None:
    sharded(tmp_path)
    remove_superseded(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    for name in (INDEX, FIRST, SECOND):
        (tmp_path / name).unlink()
    write(tmp_path, SINGLE, a=1.0)
    remove_superseded(tmp_path)
    assert values(tmp_path) == {"a": 1.0}
