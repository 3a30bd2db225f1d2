"""Models with layers in singular groups, as training leaves them on disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowrank_pl.checkpoint import SavedModel
from lowrank_pl.errors.checkpoint import CheckpointMismatchError
from lowrank_pl.nn import Spec
from lowrank_pl.surgery import (
    CompressionRecord,
    LayerRecord,
    ModelLayout,
    TargetSelector,
    compact_,
    read_layout,
    svd_layers,
)
from tests.surgery.encoders import in_groups_, logits, padded_batch, tiny_model
from tests.surgery.test_layout import factorise_


def saved(model: nn.Module, compression: CompressionRecord | None = None) -> SavedModel:
    config: Any = model.config
    return SavedModel("x.ckpt", config, read_layout(model), dict(model.state_dict()), compression=compression)


def recorded(model: nn.Module, dense: list[str]) -> CompressionRecord:
    """A record in which some layers end dense."""
    layers = [
        LayerRecord(n, s.out_features, s.in_features, s.rank, "dense" if n in dense else "low_rank", 0)
        for n, s in svd_layers(model).items()
    ]
    return CompressionRecord("Method", {}, tuple(layers))


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
@pytest.mark.parametrize("every", [0, 2], ids=["none_dense", "some_dense"])
def test_compacted_it_loads_into_a_dense_encoder_with_the_same_function(family: str, every: int) -> None:
    model, batch = in_groups_(tiny_model(family)), padded_batch()
    dense = list(svd_layers(model))[::every] if every else []
    compact = saved(model, recorded(model, dense)).compacted()
    fresh = tiny_model(family, seed=5)
    compact.load_into_(fresh)
    torch.testing.assert_close(logits(fresh, batch), logits(model, batch), rtol=0, atol=1e-5)
    assert not svd_layers(fresh)
    assert compact.layout == read_layout(fresh) == read_layout(compact_(model, dense))
    assert len(compact.layout.modules) == len(TargetSelector().select(tiny_model(family))) - len(dense)


def test_without_a_record_every_layer_gets_its_exact_rank() -> None:
    model = in_groups_(tiny_model("bert"))
    ranks: dict[str, Spec] = {
        name: {"form": "low_rank", "rank": layer.rank} for name, layer in svd_layers(model).items()
    }
    compact = saved(model).compacted()
    assert compact.layout == ModelLayout(ranks)
    assert compact.compression is None
    for name, spec in ranks.items():
        left, right = (compact.state[f"{name}.{part}.weight"] for part in ("left", "right"))
        assert left.shape[1] == right.shape[0] == spec["rank"]


def test_uncompacted_it_loads_with_its_groups_and_their_ranks() -> None:
    model, fresh = in_groups_(tiny_model("bert")), tiny_model("bert", seed=5)
    saved(model).load_into_(fresh)
    assert torch.equal(logits(fresh, padded_batch()), logits(model, padded_batch()))
    assert {n: m.rank for n, m in svd_layers(fresh).items()} == {n: m.rank for n, m in svd_layers(model).items()}


def test_a_model_without_groups_is_compact_already() -> None:
    for model in (tiny_model("bert"), factorise_(tiny_model("bert"), 3)):
        stored = saved(model)
        assert stored.compacted() is stored


def test_compacting_leaves_what_was_read_alone() -> None:
    stored = saved(in_groups_(tiny_model("bert")))
    before = {name: tensor.clone() for name, tensor in stored.state.items()}
    again = stored.compacted().compacted()
    assert again.layout == stored.compacted().layout
    assert stored.state.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored.state.items())


def test_another_capacity_does_not_fit_and_nothing_is_loaded() -> None:
    stored, fresh = saved(in_groups_(tiny_model("bert"))), tiny_model("bert", seed=5)
    name = next(iter(stored.layout.modules))
    stored.state[f"{name}.sigma"] = stored.state[f"{name}.sigma"][:-1]
    embeddings = fresh.get_parameter("bert.embeddings.word_embeddings.weight").clone()
    with pytest.raises(CheckpointMismatchError, match=r"sigma' is \[31\] there and \[32\] here"):
        stored.load_into_(fresh)
    assert torch.equal(fresh.get_parameter("bert.embeddings.word_embeddings.weight"), embeddings)


def test_replacing_in_a_task_keeps_what_is_not_the_encoders() -> None:
    stored = SavedModel("x", saved(tiny_model("bert")).config, ModelLayout({}), {"a": torch.ones(1)})
    task = {"encoder.a": torch.zeros(1), "encoder.b": torch.zeros(1), "metric": torch.full((1,), 2.0)}
    replaced = stored.replace_in(task)
    assert {name: float(tensor) for name, tensor in replaced.items()} == {"encoder.a": 1.0, "metric": 2.0}
