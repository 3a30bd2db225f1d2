"""Batches of any structure are counted, divided and rebuilt alike."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from lowrank_pl.errors.numerics import BatchShapeError
from lowrank_pl.importance.batches import batch_size, first, mapped, rebuilt, selected, split, tensors_of


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


X, Y = torch.arange(10.0).view(5, 2), torch.arange(5)
BATCHES: dict[str, Any] = {
    "tensor": X,
    "dict": {"x": X, "y": Y},
    "ordered": OrderedDict(x=X, y=Y),
    "encoding": BatchEncoding({"x": X, "y": Y}),
    "tuple": (X, Y),
    "named": Pair(X, Y),
    "nested": [{"x": [X, None]}, (Y, "all", 3), torch.tensor(1.5)],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_parts_are_of_the_same_structure_and_make_up_the_whole(kind: str) -> None:
    batch = BATCHES[kind]
    assert batch_size(batch) == 5
    parts = list(split(batch, 2))
    assert [batch_size(part) for part in parts] == [2, 2, 1]
    assert all(type(part) is type(batch) for part in parts)
    whole = rebuilt(batch, [torch.cat(tensors) for tensors in zip(*map(tensors_of, parts), strict=True)])
    for found, expected in zip(tensors_of(whole), tensors_of(batch), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(tensors_of(selected(batch, torch.tensor([4, 0])))[0], X[[4, 0]])
    assert torch.equal(tensors_of(first(batch, 7))[0], X[[0, 1, 2, 3, 4, 0, 1]])


def test_the_batch_itself_is_left_alone() -> None:
    batch = {"x": X.clone()}
    mapped(batch, torch.zeros_like)
    assert torch.equal(batch["x"], X)


def test_attributes_of_a_class_stay() -> None:
    assert torch.equal(first(BATCHES["encoding"], 1).x, X[:1])


@pytest.mark.parametrize(
    ("batch", "told"),
    [("a text", "str.*no tensor"), ({}, "dict.*no tensor"), ((X, Y[1:]), r"tuple.*\[5, 2\], \[4\]")],
)
def test_what_tells_no_samples_apart_is_refused(batch: Any, told: str) -> None:
    with pytest.raises(BatchShapeError, match=told):
        batch_size(batch)
