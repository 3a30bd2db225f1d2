"""Which blocks follow from the one before, and that only those are said to which do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_pl.strategies.links import FromBlock, Link, links


class Block(nn.Module):
    """One layer; puts out a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, more: Any = None) -> tuple[Tensor, Tensor]:
        del more
        y = self.layer(x) if mask is None else self.layer(x) * mask
        return y, y.mean()


class Model(nn.Module):
    """Blocks with a mask each, as models with sliding windows have; `between` is asked what comes next."""

    def __init__(self, between: Callable[[Tensor, dict[str, Any]], Tensor] = lambda x, _: x) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        masks = [torch.ones(4), torch.tensor([1.0, 0, 1, 0])]
        given: dict[str, Any] = {}
        for index, block in enumerate(self.blocks):
            x = block(x, masks[index % 2], **given)[0]
            x = self.between(x, given)
        return x


NAMES = [f"blocks.{index}" for index in range(4)]


def found(model: Model) -> dict[str, Link]:
    with torch.no_grad():
        return links(
            partial(model, torch.randn(3, 4)), model, NAMES, [block.get_submodule("layer") for block in model.blocks]
        )


def test_a_block_is_called_with_what_the_one_before_puts_out_and_what_was_there_before_all() -> None:
    told = found(Model())
    assert list(told) == NAMES[1:]
    for name, link in told.items():
        (x, mask), _ = link.call
        assert (x, link.before) == (FromBlock((0,)), NAMES[NAMES.index(name) - 1])
        assert mask.tolist() == ([1, 0, 1, 0] if name in NAMES[1::2] else [1, 1, 1, 1])
    y = torch.randn(3, 4)
    (first, _), _ = told["blocks.1"].after((y, None))
    assert first is y


@pytest.mark.parametrize("change", [lambda x, _: x + 1, lambda x, _: x.add_(1), lambda x, _: x[0].zero_() is None or x])
def test_what_the_model_changes_in_between_breaks_the_link(change: Any) -> None:
    assert found(Model(change)) == {}


def test_a_further_argument_that_depends_on_a_block_breaks_it() -> None:
    def between(x: Tensor, given: dict[str, Any]) -> Tensor:
        given["more"] = x.sum()  # as encoders hand to decoders, or one layer's position bias to all others
        return x

    assert found(Model(between)) == {}


def test_a_look_at_a_value_ends_the_chain() -> None:
    def between(x: Tensor, _: dict[str, Any]) -> Tensor:
        return x if float(x.sum()) < 1e9 else x * 2  # an early exit, say

    assert found(Model(between)) == {}


def test_an_argument_that_is_written_into_is_not_kept() -> None:
    class Writing(Model):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(4)
            for block in self.blocks:
                x = block(x, mask)[0]
                if block is self.blocks[1]:
                    mask *= x[0, 0]
            return x

    assert list(found(Writing())) == []  # what blocks.1 was called with has gone as well


def test_a_mask_that_is_only_read_is_kept() -> None:
    def between(x: Tensor, _: dict[str, Any]) -> Tensor:
        torch.zeros(4).add_(torch.ones(4)[:2].sum())
        return x

    assert list(found(Model(between))) == NAMES[1:]


def test_under_autocast_nothing_follows() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert found(Model()) == {}
