import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, MixtralConfig, MixtralForCausalLM

from lowrank_pl.allocation import uniform_ranks
from lowrank_pl.core import truncated_svd
from lowrank_pl.errors.targets import NoTargetError, TiedWeightError
from lowrank_pl.nn import LowRankLinear, dense_weight
from lowrank_pl.surgery import TargetSelector, replace_module_
from tests.support.tiny import FAMILIES
from tests.surgery.encoders import HEADS, logits, padded_batch, tiny_model

BERT_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
LINEARS_IN_BLOCKS = dict.fromkeys(FAMILIES, 12) | {"albert": 6, "modernbert": 8, "mobilebert": 22}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_default_takes_the_linears_inside_blocks_and_nothing_else(family: str, head: str) -> None:
    targets = TargetSelector().select(tiny_model(family, head))
    assert len(targets) == LINEARS_IN_BLOCKS[family]
    for name in targets:
        assert ".0." in name or ".1." in name, name
        for part in ("embedding", "pooler", "classifier", "predictions", "lm_head", "decoder", "head."):
            assert part not in name
    assert all(type(layer) is nn.Linear for layer in targets.values())


def test_default_targets_of_bert_are_the_six_of_each_layer() -> None:
    expected = [f"bert.encoder.layer.{i}.{name}" for i in range(2) for name in BERT_LAYER]
    assert list(TargetSelector().select(tiny_model("bert"))) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_full_rank_factors_reproduce_the_logits(family: str) -> None:
    model, batch = tiny_model(family), padded_batch()
    before = logits(model, batch)
    targets = TargetSelector().select(model)
    for name, linear in targets.items():
        layer = LowRankLinear.like(linear, min(dense_weight(linear).shape))
        layer.assign_(truncated_svd(dense_weight(linear).detach(), layer.rank))
        replace_module_(model, name, layer)
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-4)
    # The replaced layers really compute the logits.
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.left.weight.data.zero_()
    assert float((logits(model, batch) - before).abs().max()) > 1e-3


@pytest.mark.parametrize("head", ["token", "masked_lm"])
@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
def test_exact_factors_reproduce_the_logits_of_other_heads(family: str, head: str) -> None:
    model, batch = tiny_model(family, head), padded_batch()
    before = logits(model, batch)
    for name, linear in TargetSelector().select(model).items():
        layer = LowRankLinear.like(linear, min(dense_weight(linear).shape))
        layer.assign_(truncated_svd(dense_weight(linear).detach(), layer.rank))
        replace_module_(model, name, layer)
    torch.testing.assert_close(logits(model, batch), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("ratio", "rank", "millions"), [(0.33, 253, 66.5), (0.22, 168, 52.4)])
def test_bert_base_reaches_the_sizes_of_the_papers(ratio: float, rank: int, millions: float) -> None:
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(BertConfig())
    shapes = TargetSelector.shapes(TargetSelector().select(model))
    allocation = uniform_ranks(shapes, rank_ratio=ratio)
    dense = sum(parameter.numel() for parameter in model.parameters())
    assert len(shapes) == 72
    assert set(allocation.ranks.values()) == {rank}
    assert allocation.dense == 84_934_656
    if rank == 253:
        assert allocation.kept == 41_969_664
    assert round(dense / 1e6, 1) == 109.5
    assert round((dense - allocation.dense + allocation.kept) / 1e6, 1) == millions


def test_albert_shared_layer_is_selected_once() -> None:
    names = list(TargetSelector().select(tiny_model("albert")))
    assert len(names) == len(set(names)) == 6
    assert all(name.startswith("albert.encoder.albert_layer_groups.0.albert_layers.0.") for name in names)


def test_include_replaces_the_default_and_star_crosses_dots() -> None:
    model = tiny_model("bert")
    attention = TargetSelector(include=["*.attention.*"]).select(model)
    assert list(attention) == [f"bert.encoder.layer.{i}.{name}" for i in range(2) for name in BERT_LAYER[:4]]
    # Include may reach outside the blocks, on the user's own word.
    assert list(TargetSelector(include=["bert.pooler.dense", "classifier"]).select(model)) == [
        "bert.pooler.dense",
        "classifier",
    ]


def test_exclude_applies_after_default_and_after_include() -> None:
    model = tiny_model("bert")
    assert len(TargetSelector(exclude=["*.layer.0.*"]).select(model)) == 6
    assert list(
        TargetSelector(include=["*.layer.1.*"], exclude=["*attention*", "*.layer.1.output.*"]).select(model)
    ) == ["bert.encoder.layer.1.intermediate.dense"]


@pytest.mark.parametrize(("include", "exclude"), [(None, ["query"]), (["*.dense", "query"], None)])
def test_a_glob_that_matches_nothing_is_warned_of(include: list[str] | None, exclude: list[str] | None) -> None:
    argument = "exclude" if exclude else "include"
    with pytest.warns(UserWarning, match=rf"targets.{argument} 'query' matches nothing in Bert.*Is '\*query\*' meant"):
        TargetSelector(include, exclude).select(tiny_model("bert"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TargetSelector(["*.dense", "classifier"], ["*.intermediate.*", "*embed*"]).select(tiny_model("bert"))


def test_experts_that_are_one_parameter_are_told_of() -> None:
    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    told = r"784 weights inside its blocks that are in no plain nn.Linear, beside 192 .*'.*gate_up_proj' \[2, 32, 8\]"
    for selector in (TargetSelector(), TargetSelector(exclude=["*.q_proj"]), TargetSelector(embeddings=True)):
        with pytest.warns(UserWarning, match=told):
            selector.select(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TargetSelector(["*.self_attn.*"]).select(model)


def test_what_is_factorised_or_excluded_counts_among_the_linear_layers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.mixing = nn.Parameter(torch.zeros(8, 4))

    block = Block()
    model, layers = nn.Sequential(nn.ModuleList([block])), block.layers
    for place in range(3):
        layers[place] = LowRankLinear(8, 8, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(TargetSelector().select(model)) == ["0.0.layers.3"]
    layers[2] = nn.Linear(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TargetSelector(exclude=["*.2"]).select(model)


def test_globs_are_case_sensitive() -> None:
    with pytest.raises(NoTargetError):
        TargetSelector(include=["*.Attention.*"]).select(tiny_model("bert"))


def test_explain_tells_why_each_linear_stays_dense() -> None:
    model = tiny_model("bert")
    default = TargetSelector(exclude=["*.layer.0.*", "*.query"]).explain(model)
    assert default["bert.encoder.layer.0.attention.self.query"] == "excluded by '*.layer.0.*'"
    assert default["bert.encoder.layer.1.attention.self.query"] == "excluded by '*.query'"
    assert default["bert.encoder.layer.1.attention.self.key"] == "targeted"
    assert default["bert.pooler.dense"] == default["classifier"] == "outside the transformer blocks"
    included = TargetSelector(include=["*.query"]).explain(model)
    assert included["bert.encoder.layer.1.attention.self.key"] == "not matched by include"
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert list(default) == list(included) == linears


def test_subclasses_of_linear_are_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(Scaled(3, 3), nn.Linear(3, 3))])
    assert list(TargetSelector().select(model)) == ["blocks.0.1"]


def test_shapes_are_outputs_by_inputs() -> None:
    shapes = TargetSelector.shapes({"up": nn.Linear(3, 7)})
    assert (shapes["up"].out_features, shapes["up"].in_features) == (7, 3)


@pytest.mark.parametrize("other_is_embedding", [True, False])
def test_tied_weight_is_refused_with_both_names(other_is_embedding: bool) -> None:
    model = nn.Module()
    model.words = nn.Embedding(6, 4) if other_is_embedding else nn.Linear(4, 6)
    model.blocks = nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 4)])
    tied = model.blocks[0]
    assert isinstance(tied, nn.Linear)
    tied.weight = model.words.weight
    with pytest.raises(TiedWeightError) as caught:
        TargetSelector().select(model)
    assert "'blocks.0'" in str(caught.value)
    assert "'words'" in str(caught.value)
    assert "exclude" in str(caught.value)
    assert list(TargetSelector(exclude=["blocks.0"]).select(model)) == ["blocks.1"]


def test_tied_decoder_of_a_masked_language_model_is_refused_when_asked_for() -> None:
    model = tiny_model("bert", "masked_lm")
    with pytest.raises(TiedWeightError, match=r"'cls\.predictions\.decoder'.*word_embeddings"):
        TargetSelector(include=["*.decoder"]).select(model)


def test_empty_selection_names_the_model_the_globs_and_an_example() -> None:
    with pytest.raises(NoTargetError) as caught:
        TargetSelector(include=["*.atention.*"], exclude=["*.key"]).select(tiny_model("bert"))
    for part in (
        "BertForSequenceClassification",
        "include=['*.atention.*']",
        "exclude=['*.key']",
        "14 linears",
        "'bert.encoder.layer.0.attention.self.query'",
        "targets.include",
    ):
        assert part in str(caught.value), part


def test_empty_selection_on_a_factorised_model_says_so() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([LowRankLinear(4, 4, 1), LowRankLinear(4, 4, 1)])
    with pytest.raises(NoTargetError, match=r"2 layers are factorised already.*NoCompression"):
        TargetSelector().select(model)


def test_empty_selection_on_a_factorised_encoder_says_so() -> None:
    # Its dense head is still there: the default selection is empty because the blocks are factorised.
    model = tiny_model("bert")
    for name, linear in TargetSelector().select(model).items():
        replace_module_(model, name, LowRankLinear.like(linear, 4))
    with pytest.raises(NoTargetError, match=r"12 layers are factorised already"):
        TargetSelector().select(model)
