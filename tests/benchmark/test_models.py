"""Models from every place they may lie, and what one forward pass costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from lowrank_pl.benchmark.models import count_flops, inputs_for, peak_memory, weight_bytes
from lowrank_pl.checkpoint import load_model
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.hub import longest_input
from tests.support.tiny import save_tiny_model


def test_flops_are_those_of_the_matrix_products(tiny_bert: str) -> None:
    """Counted by hand: per token of a layer four square matrices, up and down; attention; the head of BERT's MLM."""
    model = load_model(tiny_bert)
    batch, length, wide, inner, layers, words = 3, 7, 32, 64, 2, model.config.vocab_size
    tokens = batch * length
    linears = layers * (4 * wide * wide + 2 * wide * inner) + wide * wide + wide * words
    attention = layers * 2 * length * wide
    assert count_flops(model, inputs_for(model, batch, length)) == 2 * tokens * (linears + attention)


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_inputs_fit_the_model(family: str, tmp_path: Path) -> None:
    model = load_model(str(save_tiny_model(family, tmp_path / family)))
    longest = longest_input(model)
    inputs = inputs_for(model, 2, longest)
    assert inputs["input_ids"].shape == (2, longest)
    assert int(inputs["input_ids"].max()) < model.config.vocab_size
    model(**inputs)
    with pytest.raises(RangeError, match=f"1 … {longest}"):
        inputs_for(model, 2, longest + 1)
    with pytest.raises((IndexError, RuntimeError)):  # the model could not have run it
        model(**{name: torch.cat([ids, ids[:, :1]], 1) for name, ids in inputs.items()})


def test_a_model_whose_positions_go_on_for_ever() -> None:
    config = AutoConfig.for_model("xlnet", vocab_size=32, d_model=8, n_layer=1, n_head=2, d_inner=8)
    assert config.max_position_embeddings == -1
    inputs_for(AutoModel.from_config(config), 1, 5000)


def test_weights_take_four_bytes_each_in_float32(tiny_bert: str) -> None:
    model = load_model(tiny_bert)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert weight_bytes(model) == 4 * sum(p.numel() for p in model.parameters()) + buffers


def test_only_cuda_tells_its_peak(tiny_bert: str) -> None:
    assert peak_memory(load_model(tiny_bert), lambda: pytest.fail("ran for nothing")) is None
