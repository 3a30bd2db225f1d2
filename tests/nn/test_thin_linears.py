"""Whatever looks for `nn.Linear` finds the two inside a factorised layer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lowrank_pl.nn import LowRankLinear
from lowrank_pl.surgery import read_layout
from tests.surgery.encoders import logits, padded_batch, tiny_model
from tests.surgery.test_layout import factorise_


def factorised() -> Any:
    return factorise_(tiny_model("bert"), 4)


def thin(model: nn.Module) -> list[nn.Linear]:
    layers = [layer for layer in model.modules() if isinstance(layer, LowRankLinear)]
    assert len(layers) == 12
    return [linear for layer in layers for linear in (layer.left, layer.right)]


def test_they_are_plain_linears_and_the_layer_runs_them() -> None:
    model, calls = factorised(), []
    for linear in thin(model):
        assert type(linear) is nn.Linear
        linear.register_forward_hook(lambda *_: calls.append(1))
    logits(model, padded_batch())
    assert len(calls) == 24


def test_pruning_masks_their_weights() -> None:
    model, batch = factorised(), padded_batch()
    before = logits(model, batch)
    targets = [(linear, "weight") for linear in thin(model)]
    prune.global_unstructured(targets, pruning_method=prune.L1Unstructured, amount=0.5)
    assert not torch.equal(logits(model, batch), before)
    zeros = sum(int((linear.weight == 0).sum()) for linear in thin(model))
    assert zeros == round(sum(linear.weight.numel() for linear in thin(model)) * 0.5)
    pruned = logits(model, batch)
    for linear in thin(model):
        prune.remove(linear, "weight")
    assert torch.equal(logits(model, batch), pruned)
    assert read_layout(model) == read_layout(factorised())


def test_dynamic_quantisation_of_torch_replaces_them() -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("this build of torch quantises nothing")
    model, batch = factorised(), padded_batch()
    before = logits(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch prefers torchao by now
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    kinds: list[Any] = [type(layer.left) for layer in quantised.modules() if isinstance(layer, LowRankLinear)]
    assert kinds == [torch.ao.nn.quantized.dynamic.Linear] * 12
    torch.testing.assert_close(logits(quantised, batch), before, rtol=0, atol=0.1)


def test_torchao_quantises_them() -> None:
    quantisation = pytest.importorskip("torchao.quantization")
    model, batch = factorised(), padded_batch()
    before, kinds = logits(model, batch), {id(linear): type(linear.weight.data) for linear in thin(model)}
    quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig())
    assert all(type(linear.weight.data) is not kinds[id(linear)] for linear in thin(model))
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=0.05)


def test_peft_adapts_them() -> None:
    peft = pytest.importorskip("peft")
    model, batch = factorised(), padded_batch()
    before = logits(model, batch)
    config = peft.LoraConfig(r=2, target_modules=["left", "right"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert sum(isinstance(module, peft.tuners.lora.Linear) for module in adapted.modules()) == 24
    assert not torch.equal(logits(adapted, batch), before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, batch), before)
    changed = logits(adapted, batch)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), batch), changed, rtol=0, atol=1e-4)
