"""Tokens that the loss does not depend on are told by their gradients, whatever rounding has left of these."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_pl.core import LinearShape
from lowrank_pl.importance import KroneckerSensitivity
from lowrank_pl.importance.reached import reached


def gradients() -> Tensor:
    """Two samples of three tokens and four features; the second sample's gradients are far smaller."""
    g = torch.rand(2, 3, 4) + 0.5
    g[1] *= 1e-7
    return g


def test_what_rounding_leaves_is_no_gradient() -> None:
    g = gradients()
    g[0, 0] *= 1e-7
    g[1, 2] = 0
    assert reached(g).tolist() == [[False, True, True], [True, True, False]]


def test_a_sample_counts_by_its_own_gradients() -> None:
    """However small they are beside those of others in its batch."""
    together, alone = reached(gradients()), [reached(part) for part in gradients().split(1)]
    assert torch.equal(together, torch.cat(alone))
    assert bool(together.all())


def test_a_sample_without_gradients_has_no_tokens() -> None:
    assert not bool(reached(torch.zeros(1, 3, 4)).any())
    assert reached(torch.tensor([[1e-9, 0.0], [1.0, 2.0], [0.0, 0.0]])).tolist() == [True, True, False]  # a row each


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_vanish(value: float) -> None:
    g = gradients()
    g[0, 1, 2] = value
    assert bool(reached(g)[0, 1])


def test_rounding_changes_no_count_of_training_steps() -> None:
    x, g = torch.randn(2, 3, 5), gradients()
    g[0, 0] = 0
    shape, found = LinearShape(4, 5), []
    for left_over in (0.0, 1e-8):
        sensitivity = KroneckerSensitivity()
        sensitivity.begin_step()
        assert sensitivity.add("layer", x, g + left_over * (g == 0))
        found.append(sensitivity.moments("layer", shape, torch.device("cpu")))
    for exact, rounded in zip(*found, strict=True):
        torch.testing.assert_close(rounded, exact)
    assert float(found[0][-1]) == 5
