"""`LowRankLinear.weight`: free where only its kind is asked for, the product where its values are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5LayerFF

from lowrank_pl.core import truncated_svd
from lowrank_pl.nn import LowRankLinear
from lowrank_pl.nn import product as module
from lowrank_pl.surgery import replace_module_
from tests.core.matrices import random_matrix


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every multiplication."""
    made: list[int] = []
    multiplied = module._multiplied

    def counted(value: object) -> object:
        if isinstance(value, module.LazyProduct):
            made.append(1)
        return multiplied(value)

    monkeypatch.setattr(module, "_multiplied", counted)
    return made


def layer() -> LowRankLinear:
    made = LowRankLinear(5, 4, 3)
    made.assign_(truncated_svd(random_matrix(4, 5), 3))
    return made


def test_asking_for_its_kind_multiplies_nothing(products: list[int]) -> None:
    weight = layer().weight
    assert isinstance(weight, Tensor)
    assert (weight.dtype, weight.device.type, tuple(weight.shape), weight.ndim) == (torch.float32, "cpu", (4, 5), 2)
    assert (weight.size(0), weight.numel(), weight.dim(), weight.is_floating_point()) == (4, 20, 2, True)
    assert weight.requires_grad
    assert not products


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w.detach(),
        lambda w: w + 0,
        lambda w: w.T.contiguous().T,
        lambda w: torch.cat([w]),
        lambda w: w.clone(),
        lambda w: w.float(),
        lambda w: F.linear(torch.eye(5), w).T,
    ],
)
def test_every_use_of_its_values_is_one_of_the_product(use: Callable[[Tensor], Tensor], products: list[int]) -> None:
    made = layer()
    found = use(made.weight)
    assert type(found) is Tensor
    assert torch.equal(found.detach(), made.product().detach())
    assert products


def test_gradients_reach_the_factors() -> None:
    made, other = layer(), layer()
    made.weight.square().sum().backward()
    other.product().square().sum().backward()
    assert made.left.weight.grad is not None
    assert torch.equal(made.left.weight.grad, other.left.weight.grad)  # type: ignore[arg-type]


def test_the_feed_forward_of_t5_runs_and_costs_no_product(products: list[int]) -> None:
    config = T5Config(d_model=8, d_ff=12, dropout_rate=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = T5LayerFF(config).eval()
    x = random_matrix(2, 3, 8)
    expected = block(x)
    dense = block.DenseReluDense.wo
    thin = LowRankLinear.like(dense, 8)
    thin.assign_(truncated_svd(dense.weight.detach(), 8))
    replace_module_(block, "DenseReluDense.wo", thin)
    torch.testing.assert_close(block(x), expected)
    assert not products
    block.half()
    block.DenseReluDense.wo.float()  # as T5 keeps it in half precision
    assert block.DenseReluDense(x.half()).dtype is torch.float32


def test_a_compiled_model_may_ask_for_it() -> None:
    made = layer()
    program = torch.export.export(Asks(made), (random_matrix(2, 5),))
    torch.testing.assert_close(program.module()(random_matrix(2, 5)), made(random_matrix(2, 5)))


class Asks(torch.nn.Module):
    def __init__(self, inner: LowRankLinear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.to(self.inner.weight.dtype))
        return y
