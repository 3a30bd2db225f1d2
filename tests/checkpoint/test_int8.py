"""Weights in eight bits: what is rounded and by how much, and that a file gives back the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from lowrank_pl.checkpoint import from_pretrained, is_quantized, quantize_
from lowrank_pl.checkpoint.int8 import int8_weights, stored_bytes
from lowrank_pl.errors.checkpoint import (
    CheckpointMismatchError,
    DamagedWeightsError,
    NotACheckpointError,
    QuantizedModelError,
)
from lowrank_pl.errors.export import NotSavableError, QuantizationError
from lowrank_pl.errors.run import MissingPackagesError
from lowrank_pl.export import save_pretrained
from lowrank_pl.nn import LowRankLinear, SVDLinear
from lowrank_pl.surgery import TargetSelector, replace_module_
from tests.support.tiny import tiny_config, tiny_decoder

BLOCK = "bert.encoder.layer.0"
LAYER = f"{BLOCK}.intermediate.dense"
FILE = "model_int8.safetensors"


def without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def model() -> Any:
    """One block; a layer factorised at rank 3, the others dense, the head's output tied to the embeddings."""
    torch.manual_seed(0)
    made = AutoModelForMaskedLM.from_config(tiny_config("bert", layers=1)).eval()
    layer = LowRankLinear.like(made.get_submodule(LAYER), 3)
    torch.nn.init.normal_(layer.left.weight)
    torch.nn.init.normal_(layer.right.weight)
    replace_module_(made, LAYER, layer)
    return made


@torch.no_grad()
def logits(made: Any) -> torch.Tensor:
    found: torch.Tensor = made(input_ids=torch.tensor([[2, 9, 30, 7, 3]])).logits
    return found


def test_without_torchao_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    without_torchao(monkeypatch)
    with pytest.raises(MissingPackagesError, match=r"'torchao'.*lowrank-pl\[torchao\]"):
        quantize_(model(), "int8_dynamic")


class TestWithTorchao:
    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("torchao")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        made = model()
        quantize_(made, "int8_dynamic")
        torch.save(logits(made), tmp_path / "logits.pt")
        return save_pretrained(made, str(tmp_path / "small"))

    def test_the_blocks_are_rounded_to_half_a_step_of_each_channel_and_nothing_else_is(self) -> None:
        made = model()
        before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
        names = quantize_(made, "int8_weight_only")
        dense = TargetSelector().explain(made)
        inside = [name for name, told in dense.items() if told == "targeted"]
        assert set(names) == {f"{LAYER}.left", f"{LAYER}.right", *inside}
        assert all(name.startswith(BLOCK) for name in names)
        weights = int8_weights(made)
        assert set(weights) == set(names)
        for name, weight in weights.items():
            step = before[f"{name}.weight"].abs().amax(1, keepdim=True) / 127.5
            assert torch.allclose(weight.scale, step)
            rounded = weight.qdata * weight.scale
            assert bool(((rounded - before[f"{name}.weight"]).abs() <= 0.5001 * step).all())
        for name, tensor in made.state_dict().items():
            if name.removesuffix(".weight") not in names:
                assert torch.equal(tensor, before[name])

    def test_a_loaded_model_is_the_same_to_the_last_bit_and_writes_the_same_folder(
        self, folder: Path, tmp_path: Path
    ) -> None:
        loaded = from_pretrained(str(folder))
        assert is_quantized(loaded)
        assert torch.equal(logits(loaded), torch.load(tmp_path / "logits.pt"))
        assert not torch.equal(logits(loaded), logits(model()))
        loaded.save_pretrained(tmp_path / "again")
        for name in (FILE, "config.json", "SHA256SUMS"):
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
        with pytest.raises(NotSavableError, match="upload the folder"):
            loaded.save_pretrained(tmp_path / "third", push_to_hub=True)

    def test_the_file_has_plain_numbers_and_no_other_loader_takes_them(self, folder: Path) -> None:
        stored = load_file(folder / FILE)
        assert stored[f"{LAYER}.left.weight"].dtype == torch.int8
        assert stored[f"{LAYER}.left.weight_scale"].shape == stored[f"{LAYER}.left.weight"].shape[:1]
        size = sum(stored_bytes(p) for p in from_pretrained(str(folder)).parameters())
        assert size <= sum(tensor.nbytes for tensor in stored.values()) < size + 4096  # buffers
        with pytest.raises(OSError, match="safetensors"):
            AutoModelForMaskedLM.from_pretrained(folder)
        assert "lowrank-pl[torchao]" in (folder / "README.md").read_text()

    def test_what_multiplies_a_single_number_stays_in_float(self) -> None:
        made = model()
        layer = LowRankLinear.like(made.get_submodule(f"{BLOCK}.output.dense"), 1)
        torch.nn.init.ones_(layer.right.weight)
        replace_module_(made, f"{BLOCK}.output.dense", layer)
        names = quantize_(made, "int8_dynamic")
        assert f"{BLOCK}.output.dense.right" in names
        assert f"{BLOCK}.output.dense.left" not in names
        assert bool(torch.isfinite(logits(made)).all())

    def test_what_torchao_does_not_know_is_named(self, caplog: pytest.LogCaptureFixture) -> None:
        made = tiny_decoder("gpt2")
        with pytest.raises(QuantizationError, match=r"8 layers .* are Conv1D, such as '.*c_attn'; .*it first"):
            quantize_(made, "int8_dynamic")
        name = "transformer.h.0.mlp.c_fc"
        layer = LowRankLinear.like(made.get_submodule(name), 3)
        torch.nn.init.normal_(layer.left.weight)
        torch.nn.init.normal_(layer.right.weight)
        replace_module_(made, name, layer)
        assert quantize_(made, "int8_dynamic") == [f"{name}.left", f"{name}.right"]
        assert "7 layers of its blocks are Conv1D, such as 'transformer.h.0.attn.c_attn'; these stay in" in caplog.text

    def test_what_is_quantised_is_not_quantised_again_and_a_form_of_training_not_at_all(self) -> None:
        made = model()
        quantize_(made, "int8_dynamic")
        with pytest.raises(QuantizedModelError, match="BertForMaskedLM' is in int8"):
            quantize_(made, "int8_dynamic")
        made = model()
        name = f"{BLOCK}.output.dense"
        replace_module_(made, name, SVDLinear.empty({"capacity": 4}, made.get_submodule(name)))
        with pytest.raises(QuantizationError, match=rf"'{name}' is still in the form 'singular_groups'"):
            quantize_(made, "int8_dynamic")
        assert not is_quantized(made)

    @pytest.mark.parametrize(
        ("told", "message"),
        [
            ({"version": 2, "scheme": "int8_dynamic", "modules": []}, "'int8_dynamic' of version 2"),
            ({"version": 1, "scheme": "int4", "modules": []}, "'int4' of version 1"),
            ({"version": 1, "scheme": "int8_dynamic"}, "without the list of its 'modules'"),
        ],
    )
    def test_what_another_release_may_have_written_is_refused(
        self, told: dict[str, Any], message: str, folder: Path
    ) -> None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, "lowrank_int8": told}))
        with pytest.raises(NotACheckpointError, match=message):
            from_pretrained(str(folder))

    def test_damaged_folders_are_refused(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stored = load_file(folder / FILE)
        scale = f"{LAYER}.left.weight_scale"
        save_file({name: tensor for name, tensor in stored.items() if name != scale}, folder / FILE)
        with pytest.raises(DamagedWeightsError):
            from_pretrained(str(folder))
        (folder / "SHA256SUMS").unlink()
        with pytest.raises(CheckpointMismatchError, match=f"missing '{scale}'"):
            from_pretrained(str(folder))
        save_file({**stored, scale: stored[scale][:-1].contiguous()}, folder / FILE)
        with pytest.raises(CheckpointMismatchError, match=r"not \[m, n\] in int8 with scales \[m\]"):
            from_pretrained(str(folder))
        save_file({**stored, "bert.pooler.x": torch.zeros(2, dtype=torch.int8)}, folder / FILE)
        with pytest.raises(CheckpointMismatchError, match=r"'bert\.pooler\.x' is in int8"):
            from_pretrained(str(folder))
        without_torchao(monkeypatch)
        with pytest.raises(MissingPackagesError, match="a model in int8 needs"):
            from_pretrained(str(folder))
        (folder / FILE).unlink()
        with pytest.raises(NotACheckpointError, match=f"it has no {FILE}"):
            from_pretrained(str(folder))
