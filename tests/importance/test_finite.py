"""Which module is the first to put out NaN or Inf."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pl.importance.finite import first_not_finite, is_finite


class Root(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"roots": (x.sqrt(), None), "count": torch.tensor(1)}


def test_the_innermost_and_earliest_is_named_and_the_pass_ends_there() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), Root()), Root())
    modules, x = dict(model.named_modules()), torch.tensor([[1.0, 2.0]])
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
    assert first_not_finite(modules, lambda: modules["1"](model[0](x))) is None
    assert first_not_finite(modules, lambda: modules["2"](-x)) == "the output of module '2'"
    model[0].weight.data[1, 1] = torch.inf
    reached: list[bool] = []
    found = first_not_finite(modules, lambda: reached.append(model(x) is not None))
    assert found == "the output of module '0', whose weight is not finite"
    layer: dict[str, nn.Module] = {"a": nn.Linear(2, 2)}
    assert first_not_finite(layer, lambda: layer["a"](x / 0), inputs=True) == "the input of layer 'a'"
    whole = Root()
    assert first_not_finite({"": whole}, lambda: whole(-x)) == "the output of module 'Root'"
    assert not reached
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_finite() -> None:
    assert is_finite({"a": [torch.ones(2), 3], "b": torch.tensor(1)})
    assert not is_finite(({"a": torch.tensor(torch.nan)},))
