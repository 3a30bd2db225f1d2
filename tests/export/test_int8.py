"""ONNX files in eight bits: what is in them, and what is refused. How far away logits are: test_onnx_families.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic

from lowrank_pl.cli import main
from lowrank_pl.errors.export import QuantizationError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.outputs import OutputNotWritableError
from lowrank_pl.export import export, int8
from lowrank_pl.nn import PivotedLinear, forms_in

pytestmark = pytest.mark.usefixtures("onnx_once")
Flat = tuple[Any, str]


def exported(flat: Flat, folder: Path, **options: Any) -> Path:
    return export(flat[1], str(folder / "out"), format="onnx", **options)


def weights(where: Path) -> dict[str, Any]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(where / "model.onnx")).graph.initializer}


def test_factors_and_embeddings_are_stored_in_eight_bits(flat_checkpoint: Flat, tmp_path: Path) -> None:
    encoder = flat_checkpoint[0]
    where = exported(flat_checkpoint, tmp_path, quantize="int8")
    stored = weights(where)
    eight = {array.shape for array in stored.values() if array.dtype in (np.int8, np.uint8) and array.ndim == 2}
    forms = forms_in(encoder).values()
    pivoted = sum(isinstance(layer, PivotedLinear) for layer in forms)
    assert pivoted > 0
    assert f"* {pivoted} pivoted layers are two factors" in (where / "README.md").read_text()
    assert json.loads((where / "report.json").read_text())["onnx"]["int8"]["pivoted_as_two_factors"] == pivoted
    for layer in forms:
        for shape in ((layer.out_features, layer.rank), (layer.rank, layer.in_features)):
            assert shape in eight or shape[::-1] in eight
        if isinstance(layer, PivotedLinear):
            others = (layer.out_features - layer.rank, layer.rank)
            assert others not in eight
            assert others[::-1] not in eight
    assert tuple(encoder.bert.embeddings.word_embeddings.weight.shape) in eight
    assert max(array.size for array in stored.values() if array.dtype == np.float32) <= 64 * 2  # biases and norms


@pytest.mark.parametrize("reduced", [False, True])
def test_weights_have_seven_bits_where_eight_could_overflow(
    flat_checkpoint: Flat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reduced: bool
) -> None:
    monkeypatch.setattr(int8, "needs_reduced_range", lambda: reduced)
    monkeypatch.setattr(int8, "ALLOWED", 10.0)  # where this machine's sums overflow
    where = exported(flat_checkpoint, tmp_path, quantize="int8")
    products = [a for n, a in weights(where).items() if a.dtype == np.int8 and a.ndim == 2]
    assert products
    assert max(int(np.abs(array.astype(int)).max()) for array in products) == (64 if reduced else 127)
    card = (where / "README.md").read_text()
    assert ("seven bits" in card) == reduced


def test_what_a_processor_can_do_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for flags, expected in (("fpu avx2", True), ("fpu avx2 avx512_vnni", False), ("avx_vnni", False), (None, True)):
        place = tmp_path / "cpuinfo"
        place.unlink(missing_ok=True)
        if flags is not None:
            place.write_text(f"flags\t\t: {flags}\n")
        monkeypatch.setattr(int8, "_CPU_FLAGS", place)
        assert int8.needs_reduced_range() is expected
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not int8.needs_reduced_range()


def test_the_float_file_passes_other_tools_untouched(flat_checkpoint: Flat, tmp_path: Path) -> None:
    where = exported(flat_checkpoint, tmp_path)
    onnx.shape_inference.infer_shapes(onnx.load(str(where / "model.onnx")), strict_mode=True, check_type=True)
    quantize_dynamic(where / "model.onnx", tmp_path / "theirs.onnx", per_channel=True)
    assert (tmp_path / "theirs.onnx").stat().st_size < (where / "model.onnx").stat().st_size


def test_logits_that_are_far_away_leave_no_folder(
    flat_checkpoint: Flat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "ALLOWED", 1e-6)
    with pytest.raises(QuantizationError, match=r"of their size away, allowed is .*Leave --quantize out"):
        exported(flat_checkpoint, tmp_path, quantize="int8")
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_opset_or_none_at_all_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "model.onnx"
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)]), place)
    with pytest.raises(QuantizationError, match=r"operators \{'ai\.onnx': 13\}, allowed is opset 20"):
        int8.quantize_int8(torch.nn.Identity(), tmp_path)  # type: ignore[arg-type]
    place.write_bytes(b"no such thing")
    with pytest.raises(QuantizationError, match="it cannot be read"):
        int8.quantize_int8(torch.nn.Identity(), tmp_path)  # type: ignore[arg-type]


def test_a_full_disk_is_told_as_such_and_leaves_no_folder(
    flat_checkpoint: Flat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path, **kwargs: Any) -> None:
        target.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", full)
    with pytest.raises(OutputNotWritableError, match="No space left"):
        exported(flat_checkpoint, tmp_path, quantize="int8")
    assert not list(tmp_path.glob("*out*"))


def test_a_disk_that_is_full_unnoticed_is_no_fault_of_the_quantiser(
    flat_checkpoint: Flat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def truncated(*args: Any, **kwargs: Any) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=0)
        monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
        raise ValueError("Wire format was corrupt")

    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", truncated)
    with pytest.raises(OutputNotWritableError, match="No space left"):
        exported(flat_checkpoint, tmp_path, quantize="int8")
    assert not list(tmp_path.glob("*out*"))


def test_a_failure_of_the_quantiser_leaves_no_folder(
    flat_checkpoint: Flat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no such operator")

    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", fail)
    with pytest.raises(QuantizationError, match=r"cannot quantise it .*no such operator"):
        exported(flat_checkpoint, tmp_path, quantize="int8")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("options", [{"quantize": "int4", "format": "onnx"}, {"quantize": "int8", "format": "dense"}])
def test_other_requests_are_refused_before_anything_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RangeError, match=r"quantize.*'int8' with format 'onnx'"):
        export("no.ckpt", str(tmp_path / "out"), **options)


def test_the_command_line_takes_it(flat_checkpoint: Flat, tmp_path: Path) -> None:
    words = ["--format", "onnx", "--quantize", "int8", "--output", str(tmp_path / "out")]
    main(["export", "--ckpt_path", flat_checkpoint[1], *words])
    assert "int8" in json.loads((tmp_path / "out" / "report.json").read_text())["onnx"]
