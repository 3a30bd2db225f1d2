"""Layers in the order of their calls, and blocks called again as a whole pass calls them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer

from lowrank_pl.strategies import Calibration, Refit, kept_calls
from lowrank_pl.strategies.replay import Stage, again, call_of, stages
from tests.strategies.test_refit import dense_layers, factorised, strategy
from tests.support.runs import make_trainer
from tests.support.synthetic import SyntheticData
from tests.support.tiny import save_tiny_model


class Block(nn.Module):
    """Two layers with one input and one behind them; adds into what it gets, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, scale: float = 1.0, cache: Any = None) -> Tensor:
        if cache is not None:
            cache.append(x)
        y: Tensor = self.out(self.one(x) * self.two(x))
        return x.add_(scale * y)


class Model(nn.Module):
    """An embedding, blocks in a list, and a last layer that is called twice."""

    def __init__(self, cached: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.cached = cached

    def forward(self, x: Tensor) -> Tensor:
        cache: set[int] | None = set() if self.cached else None
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=0.5, **({} if cache is None else {"cache": [cache]}))
        result: Tensor = self.last(self.last(x))
        return result


LAYERS = ["last", "blocks.1.out", *(f"blocks.{i}.{name}" for i in (0, 1) for name in ("two", "one")), "first"]


def test_layers_come_in_the_order_of_their_calls_with_their_blocks() -> None:
    model = Model()
    found = stages(partial(model, torch.randn(5, 3)), model, LAYERS)
    assert found == [
        Stage(("first",), ""),
        Stage(("blocks.0.one", "blocks.0.two"), "blocks.0"),
        Stage(("blocks.1.one", "blocks.1.two"), "blocks.1"),
        Stage(("blocks.1.out",), "blocks.1"),
    ]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_lists_that_are_called_several_times_are_no_blocks() -> None:
    model = Model()
    model.blocks[1] = model.blocks[0]
    assert stages(partial(model, torch.randn(5, 3)), model, ["blocks.0.one", "first"]) == [Stage(("first",), "")]


def test_a_layer_that_is_an_element_itself_is_its_block() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3)])})
    run = partial(model.get_submodule("layers.0"), torch.randn(2, 3))
    assert stages(run, model, ["layers.0"]) == [Stage(("layers.0",), "layers.0")]


def test_a_layer_that_is_called_from_outside_its_block_has_none() -> None:
    model = Model()
    x = torch.randn(5, 4)

    def run() -> None:
        for block in model.blocks:
            block(block.get_submodule("one")(x))

    model.blocks[1].one = nn.Identity()
    found = stages(run, model, ["blocks.0.one", "blocks.0.two", "blocks.1.out"])
    assert found == [Stage(("blocks.0.two",), "blocks.0"), Stage(("blocks.1.out",), "blocks.1")]
    only = stages(lambda: model.blocks[0].get_submodule("out")(x), model, ["blocks.0.out"])
    assert only == [Stage(("blocks.0.out",), "")]


def test_a_block_gets_the_same_every_time() -> None:
    model, x = Model(), torch.randn(5, 3)
    block = model.blocks[1]
    with torch.no_grad():
        call = call_of(block, partial(model, x))
        assert call is not None
        seen: list[Tensor] = []
        block.get_submodule("out").register_forward_hook(lambda _, __, output: seen.append(output))
        for _ in range(3):
            again(block, call)
        model(x)
    assert all(torch.equal(output, seen[-1]) for output in seen)


def test_a_block_with_a_cache_is_not_called_again() -> None:
    model = Model(cached=True)
    assert call_of(model.blocks[0], partial(model, torch.randn(5, 3))) is None


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2", "mobilebert", "modernbert"])
def test_refitting_block_by_block_is_refitting_by_whole_passes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained = str(save_tiny_model(family, tmp_path / "model"))
    calls: list[nn.Module] = []

    def counted(block: nn.Module, call: Any) -> object:
        calls.append(block)
        return again(block, call)

    monkeypatch.setattr(kept_calls, "again", counted)
    by_blocks = factorised(pretrained, tmp_path / "blocks", strategy(Refit())).encoder.state_dict()
    assert calls
    monkeypatch.setattr(kept_calls, "call_of", lambda *_: None)
    whole = factorised(pretrained, tmp_path / "whole", strategy(Refit())).encoder.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in by_blocks.items())


def test_blocks_are_called_as_often_as_there_are_layers_in_them(tmp_path: Path) -> None:
    """Twice as deep a model takes twice as many calls of blocks, and not four times as many."""

    def calls(depth: int, monkeypatch: pytest.MonkeyPatch) -> int:
        pretrained = str(save_tiny_model("bert", tmp_path / f"model-{depth}", layers=depth))
        counted: list[str] = []
        original = BertLayer.forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            counted.append("")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(BertLayer, "forward", forward)
        data = SyntheticData()
        refitted = Refit(16)
        task = factorised(pretrained, tmp_path / f"run-{depth}", strategy(None))
        trainer = make_trainer(tmp_path / f"again-{depth}", logger=False)
        trainer.strategy.connect(task)
        dense, layers = dense_layers(pretrained)
        del dense
        setattr(trainer, "datamodule", data)  # noqa: B010
        counted.clear()
        refitted.fit_(trainer, task, Calibration(cache=False, batch_size=16), layers)
        return len(counted)

    with pytest.MonkeyPatch.context() as monkeypatch:
        few = calls(2, monkeypatch)
    with pytest.MonkeyPatch.context() as monkeypatch:
        many = calls(6, monkeypatch)
    with pytest.MonkeyPatch.context() as monkeypatch:
        more = calls(10, monkeypatch)
    assert more - many == many - few
