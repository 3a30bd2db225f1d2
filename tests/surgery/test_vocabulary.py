"""Where the vocabulary's matrix is, and heads that are tied to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM, T5Config, T5EncoderModel

from lowrank_pl.core import truncated_svd
from lowrank_pl.errors.checkpoint import CheckpointMismatchError
from lowrank_pl.errors.targets import VocabularyError
from lowrank_pl.nn import LowRankEmbedding, dense_shape, dense_weight, forms_in
from lowrank_pl.surgery import (
    ModelLayout,
    TargetSelector,
    conform_,
    densify_,
    find_vocabulary,
    heads_tied_to,
    read_layout,
    replace_module_,
    tie_head_,
    tied_heads,
)
from tests.support.tiny import FAMILIES, VOCAB, tiny_config
from tests.surgery.encoders import logits, padded_batch, tiny_model

WORDS, DECODER = "bert.embeddings.word_embeddings", "cls.predictions.decoder"


def language_model(family: str = "bert") -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForMaskedLM.from_config(tiny_config(family)).eval()


def factorise_(model: Any, rank: int) -> Any:
    name, dense = find_vocabulary(model)
    heads = heads_tied_to(model, name)
    made = LowRankEmbedding.empty({"rank": rank}, dense)
    made.assign_(truncated_svd(dense_weight(dense).detach(), rank))
    replace_module_(model, name, made)
    for head in heads:
        tie_head_(model, head, name)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_gives_every_language_model_back_with_one_storage(family: str) -> None:
    dense, batch = language_model(family), padded_batch()
    model = factorise_(copy.deepcopy(dense), dense_shape(find_vocabulary(dense)[1]).full_rank)
    assert len(tied_heads(model)) == 1
    torch.testing.assert_close(logits(model, batch), logits(dense, batch), rtol=1e-4, atol=1e-5)
    [form] = [form for form in forms_in(model).values() if isinstance(form, LowRankEmbedding)]
    before = sum(p.numel() for p in dense.parameters()) - form.shape.dense_params
    assert sum(p.numel() for p in model.parameters()) == before + form.parameters_of(form.spec(), form.shape)


def test_a_layout_gives_another_model_the_same_ties() -> None:
    model = factorise_(language_model(), 5)
    layout = read_layout(model)
    assert layout.modules == {
        WORDS: {"form": "low_rank_embedding", "rank": 5},
        DECODER: {"form": "low_rank", "rank": 5, "tied": WORDS},
    }
    other = language_model()
    conform_(other, ModelLayout.from_dict(layout.to_dict()))
    other.load_state_dict(model.state_dict())
    assert tied_heads(other) == {DECODER: WORDS}
    assert other.get_submodule(DECODER).left.bias is other.cls.predictions.bias
    assert torch.equal(logits(other, padded_batch()), logits(model, padded_batch()))
    before = list(other.parameters())
    conform_(other, layout)
    assert all(a is b for a, b in zip(other.parameters(), before, strict=True))


def test_dense_again_the_head_is_tied_as_before() -> None:
    dense = language_model()
    model = factorise_(copy.deepcopy(dense), 5)
    expected = logits(model, padded_batch())
    ties = dict(model.all_tied_weights_keys)
    assert ties[f"{DECODER}.right.weight"] == f"{WORDS}.right.weight"
    densify_(model)
    assert model.get_submodule(DECODER).weight is model.get_submodule(WORDS).weight
    assert model.get_submodule(DECODER).bias is model.cls.predictions.bias
    assert model.all_tied_weights_keys == dense.all_tied_weights_keys
    torch.testing.assert_close(logits(model, padded_batch()), expected, rtol=1e-4, atol=1e-6)


def test_the_vocabulary_is_a_target_only_if_it_is_asked_for() -> None:
    model = tiny_model("bert")
    linears = list(TargetSelector().select(model))
    assert list(TargetSelector(embeddings=True).select(model)) == [WORDS, *linears]
    assert list(TargetSelector([], embeddings=True).select(model)) == [WORDS]
    assert list(TargetSelector(exclude=["*word*"], embeddings=True).select(model)) == linears
    assert WORDS not in TargetSelector().explain(model)
    factorise_(model, 3)
    assert list(TargetSelector(embeddings=True).select(model)) == linears


def test_a_layout_of_another_architecture_is_refused() -> None:
    layout = ModelLayout({f"{WORDS}": {"form": "low_rank", "rank": 2}})
    with pytest.raises(CheckpointMismatchError, match=r"'low_rank' at .*the model has Embedding"):
        conform_(language_model(), layout)
    layout = ModelLayout({DECODER: {"form": "low_rank_embedding", "rank": 2}})
    with pytest.raises(CheckpointMismatchError, match="the model has Linear"):
        conform_(language_model(), layout)


class Scaled(nn.Embedding):
    """With a forward of its own."""


def test_what_cannot_be_factorised_is_refused() -> None:
    with pytest.raises(VocabularyError, match="no method get_input_embeddings"):
        find_vocabulary(nn.Sequential(nn.Embedding(4, 2)))
    model: Any = tiny_model("bert")
    model.bert.embeddings.word_embeddings = Scaled(4, 2)
    with pytest.raises(VocabularyError, match="returns a Scaled"):
        find_vocabulary(model)
    model.bert.embeddings.word_embeddings = nn.Embedding(4, 2, max_norm=1.0)
    with pytest.raises(VocabularyError, match=r"'bert\.embeddings\.word_embeddings' has max_norm=1\.0"):
        TargetSelector(embeddings=True).select(model)
    sizes: dict[str, Any] = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    shared = T5EncoderModel(T5Config(vocab_size=len(VOCAB), **sizes))
    with pytest.raises(VocabularyError, match=r"shares its matrix with '.*embed_tokens', a Embedding"):
        TargetSelector(embeddings=True).select(shared)
