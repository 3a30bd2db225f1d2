"""A look-up in two factors. v = 6 tokens, d = 4, r: rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_pl.core import EmbeddingShape, Factors, LinearShape, truncated_svd
from lowrank_pl.errors.numerics import RankError, ShapeError
from lowrank_pl.nn import LayerForm, LowRankEmbedding, LowRankLinear, dense_shape, dense_weight, two_factors
from tests.core.matrices import random_matrix

TOKENS = torch.tensor([[0, 5, 3], [1, 1, 2]])


def look_up(padding_idx: int | None = None) -> nn.Embedding:
    made: nn.Embedding = nn.Embedding.from_pretrained(random_matrix(6, 4, seed=3), False, padding_idx)
    return made


def factorised(dense: nn.Embedding, rank: int) -> LowRankEmbedding:
    made = LowRankEmbedding.empty({"rank": rank}, dense)
    made.assign_(truncated_svd(dense_weight(dense).detach(), rank))
    return made


def test_a_look_up_is_a_linear_layer_of_one_hot_inputs() -> None:
    dense = look_up()
    one_hot = nn.functional.one_hot(TOKENS, 6).to(dense.weight)
    torch.testing.assert_close(nn.functional.linear(one_hot, dense_weight(dense)), dense(TOKENS))
    assert dense_shape(dense) == EmbeddingShape(4, 6) != LinearShape(4, 6)
    assert two_factors(dense_shape(dense)) is LowRankEmbedding
    assert two_factors(LinearShape(4, 6)) is LowRankLinear


def test_full_rank_gives_the_function_back_and_less_gives_that_of_the_product() -> None:
    dense = look_up()
    torch.testing.assert_close(factorised(dense, 4)(TOKENS), dense(TOKENS))
    made = factorised(dense, 2)
    best = truncated_svd(dense.weight.detach(), 2).product()
    torch.testing.assert_close(made(TOKENS), best[TOKENS])
    torch.testing.assert_close(made.weight + 0, best)
    torch.testing.assert_close(made.product(), best.mT)
    torch.testing.assert_close(made.product(), LowRankEmbedding.product_of(made.state_dict()))


def test_by_hand() -> None:
    """`E = [[2], [4]] [1, 3]`; its transpose is `[1, 3]ᵀ [2, 4]`."""
    made = LowRankEmbedding(2, 2, 1)
    made.assign_(Factors(torch.tensor([[1.0], [3.0]]), torch.tensor([4.0]), torch.tensor([[2.0, 4.0]])))
    assert made.left.weight.tolist() == [[4.0], [8.0]]
    assert made.right.weight.tolist() == [[2.0, 6.0]]
    assert made(torch.tensor([1])).tolist() == [[16.0, 48.0]]


def test_costs() -> None:
    assert LowRankEmbedding.parameters_of({"rank": 96}, EmbeddingShape(384, 30522)) == 96 * (384 + 30522)
    assert LowRankEmbedding.flops_of({"rank": 96}, EmbeddingShape(384, 30522)) == 2 * 96 * 384
    assert sum(p.numel() for p in LowRankEmbedding(6, 4, 3).parameters()) == 3 * (6 + 4)


def test_padding_dtype_mode_and_flags_are_kept_there_and_back() -> None:
    dense = look_up(padding_idx=5).double().eval().requires_grad_(False)
    made = factorised(dense, 2)
    back = made.dense()
    for layer in (made, made.left, back):
        assert layer.padding_idx == 5
        assert not layer.training
        assert {(p.dtype, p.requires_grad) for p in layer.parameters()} == {(torch.float64, False)}
    torch.testing.assert_close(back.weight, made.weight + 0)
    torch.testing.assert_close(made.dense_state(made.state_dict(), "")["weight"], back.weight)


def test_the_row_of_the_padding_gets_no_gradient() -> None:
    made = factorised(look_up(padding_idx=5), 2)
    made(TOKENS).square().sum().backward()
    assert made.left.weight.grad is not None
    assert not made.left.weight.grad[5].any()
    assert made.left.weight.grad[3].any()


def test_errors() -> None:
    assert LayerForm.by_name("low_rank_embedding") is LowRankEmbedding
    with pytest.raises(RankError, match="5"):
        LowRankEmbedding(6, 4, 5)
    with pytest.raises(ShapeError, match=r"factors\.right"):
        LowRankEmbedding(6, 4, 2).assign_(truncated_svd(random_matrix(4, 7), 2))
