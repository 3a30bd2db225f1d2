"""Every engine computes the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_pl.benchmark.engines import check_engines, prepare
from lowrank_pl.benchmark.models import inputs_for
from lowrank_pl.checkpoint import load_model
from lowrank_pl.core import truncated_svd
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.run import EngineError, MissingPackagesError
from lowrank_pl.nn import LowRankLinear


@pytest.mark.usefixtures("onnx_once")
def test_every_engine_computes_the_same(flat_checkpoint: tuple[Any, str], tmp_path: Path) -> None:
    model = load_model(flat_checkpoint[1])
    ready = prepare(model, "eager", 1, tmp_path)
    served = prepare(model, "onnxruntime", 1, tmp_path)
    for batch, length in ((1, 4), (3, 9)):
        inputs = inputs_for(model, batch, length)
        expected = model(**inputs).logits
        eager: torch.Tensor = ready(inputs)().logits  # type: ignore[attr-defined]
        assert not eager.requires_grad
        assert torch.equal(eager, expected)
        found: list[Any] = served(inputs)()  # type: ignore[assignment]
        torch.testing.assert_close(torch.from_numpy(found[0]), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.usefixtures("onnx_once")
def test_eight_bits_compute_nearly_the_same(flat_checkpoint: tuple[Any, str], tmp_path: Path) -> None:
    model = load_model(flat_checkpoint[1])
    inputs = inputs_for(model, 3, 9)
    expected = model(**inputs).logits
    found: Any = prepare(model, "onnxruntime-int8", 1, tmp_path)(inputs)()
    difference = torch.from_numpy(found[0]) - expected
    assert 0 < float(difference.norm() / expected.norm()) < 0.2


def test_compile_is_asked_for_any_length(tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling itself takes a compiler and minutes: what is asked of torch is looked at."""
    asked: list[dict[str, bool]] = []

    def compiled(model: torch.nn.Module, **options: bool) -> torch.nn.Module:
        asked.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    model = load_model(tiny_bert)
    ready = prepare(model, "compile", 1, tmp_path)
    inputs = inputs_for(model, 1, 4)
    assert torch.equal(ready(inputs)().logits, model(**inputs).logits)  # type: ignore[attr-defined]
    assert asked == [{"dynamic": True}]  # what torch without the option below takes


def test_models_of_one_class_do_not_share_what_is_compiled(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a number of versions of the same code torch would go on in eager, without a word."""
    asked: list[bool] = []

    def compiled(model: torch.nn.Module, dynamic: bool, isolate_recompiles: bool = False) -> torch.nn.Module:
        asked.append(isolate_recompiles)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    prepare(load_model(tiny_bert), "compile", 1, tmp_path)
    assert asked == [True]


class TwoLayers(nn.Module):
    """As little as compiles in seconds: an embedding and a layer in two factors."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8)
        self.layer = LowRankLinear(8, 8, 2)
        self.layer.assign_(truncated_svd(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), 2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[batch, length] → [batch, length, 8]`."""
        found: torch.Tensor = self.layer(self.words(input_ids)).relu()
        return found


@pytest.mark.skipif(
    shutil.which("g++") is None or "LOWRANK_PL_SLOW_TESTS" not in os.environ,
    reason="needs a C++ compiler and half a minute of it: set LOWRANK_PL_SLOW_TESTS=1",
)
def test_a_compiled_model_computes_the_same(tmp_path: Path) -> None:
    model: Any = TwoLayers().eval()
    ready = prepare(model, "compile", 1, tmp_path)
    for shape in ((2, 4), (3, 9)):
        inputs = {"input_ids": torch.randint(16, shape, generator=torch.Generator().manual_seed(1))}
        found: Any = ready(inputs)()
        assert not found.requires_grad
        torch.testing.assert_close(found, model(**inputs))


def test_a_missing_compiler_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
    try:
        with pytest.raises(
            EngineError, match=r"--engines compile cannot run on cpu: .* needs a C\+\+ compiler"
        ) as caught:
            check_engines(["eager", "compile"], "cpu", "float32")
    finally:
        torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
    assert "\n" not in str(caught.value)


def test_onnxruntime_is_for_float32_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    check_engines(["eager", "onnxruntime"], "cpu", "float32")
    for device, dtype in (("cuda", "float32"), ("cpu", "bfloat16")):
        with pytest.raises(MissingArgumentError, match=f"{dtype} on {device}"):
            check_engines(["onnxruntime"], device, dtype)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackagesError):
        check_engines(["onnxruntime"], "cpu", "float32")
    with pytest.raises(MissingPackagesError):
        check_engines(["onnxruntime-int8"], "cpu", "float32")
