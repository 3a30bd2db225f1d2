"""A full disk or an impossible place is told, and leaves everything as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, modeling_utils

from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.outputs import OutputNotWritableError
from lowrank_pl.export import export
from tests.export.test_export import checkpoint
from tests.files.test_atomic import FULL, is_old, names, old_folder


@pytest.mark.parametrize("form", ["factored", "dense"])
@pytest.mark.parametrize("where", ["weights", "tokenizer", "card"])
def test_a_full_disk_during_an_export(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any, where: str
) -> None:
    checkpoint(tiny_bert, tmp_path / "model.ckpt")
    old_folder(tmp_path / "out")

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError(str(FULL)) if where == "weights" else FULL

    place: dict[str, tuple[Any, str]] = {
        "weights": (modeling_utils, "safe_save_file"),
        "tokenizer": (PreTrainedTokenizerBase, "save_pretrained"),
        "card": (Path, "write_text"),
    }
    monkeypatch.setattr(*place[where], full)
    with pytest.raises(OutputNotWritableError, match=r"out' cannot be made \(.*No space left"):
        export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"), form, overwrite=True)
    assert names(tmp_path) == ["model.ckpt", "out"]
    assert is_old(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(OutputNotWritableError, match="No space left"):
        export(str(tmp_path / "model.ckpt"), str(tmp_path / "a" / "out"), form)
    assert names(tmp_path) == ["model.ckpt"]


def test_an_export_below_a_file(tiny_bert: str, tmp_path: Path) -> None:
    checkpoint(tiny_bert, tmp_path / "model.ckpt")
    with pytest.raises(OutputNotWritableError, match=r"model\.ckpt/out' cannot be made"):
        export(str(tmp_path / "model.ckpt"), str(tmp_path / "model.ckpt" / "out"))
    assert names(tmp_path) == ["model.ckpt"]


@pytest.mark.parametrize("size", ["0KB", "20", "20 bananas", "-5GB", "", "GB", "5GiB"])
def test_an_impossible_shard_size_is_refused_first(tmp_path: Path, size: str) -> None:
    with pytest.raises(RangeError, match=f"max_shard_size='{size}'"):
        export(str(tmp_path / "nothing.ckpt"), str(tmp_path / "out"), max_shard_size=size)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_shard_size_for_what_is_not_split_is_refused_first(tmp_path: Path, quantize: Any) -> None:
    with pytest.raises(RangeError, match=r"max_shard_size='1MB' .* null for ONNX files"):
        export(str(tmp_path / "no.ckpt"), str(tmp_path / "out"), "onnx", max_shard_size="1MB", quantize=quantize)


def test_a_format_that_does_not_exist_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(RangeError, match=r"format='onxx' .* 'factorised', 'factored', 'dense', 'onnx'"):
        export(str(tmp_path / "nothing.ckpt"), str(tmp_path / "out"), "onxx")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["factored", "dense"])
def test_the_weights_can_be_read_by_whom_the_umask_allows(tiny_bert: str, tmp_path: Path, form: Any) -> None:
    checkpoint(tiny_bert, tmp_path / "model.ckpt")
    (tmp_path / "plain").touch()
    export(str(tmp_path / "model.ckpt"), str(tmp_path / "out"), form)
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
