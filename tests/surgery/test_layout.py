import json
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_pl.core import truncated_svd
from lowrank_pl.errors import LowRankError
from lowrank_pl.errors.checkpoint import CheckpointMismatchError, FormSpecError, LayoutVersionError, UnknownFormError
from lowrank_pl.nn import LowRankLinear, Spec, SVDLinear, dense_weight
from lowrank_pl.surgery import (
    ModelLayout,
    TargetSelector,
    compact_,
    compact_state,
    conform_,
    read_layout,
    replace_module_,
    svd_layers,
)
from tests.surgery.encoders import in_groups_, logits, padded_batch, tiny_model


def low_rank(rank: int) -> Spec:
    return {"form": "low_rank", "rank": rank}


def groups(capacity: int) -> Spec:
    return {"form": "singular_groups", "capacity": capacity}


def factorise_(model: nn.Module, rank: int) -> nn.Module:
    for name, linear in TargetSelector().select(model).items():
        layer = LowRankLinear.like(linear, rank)
        layer.assign_(truncated_svd(dense_weight(linear).detach(), rank))
        replace_module_(model, name, layer)
    return model


def test_a_dense_model_has_an_empty_layout() -> None:
    assert read_layout(tiny_model("bert")) == ModelLayout({})


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
def test_layout_survives_json(family: str) -> None:
    layout = read_layout(factorise_(tiny_model(family), 5))
    assert all(spec == low_rank(5) for spec in layout.modules.values())
    assert set(layout.modules) == set(TargetSelector().select(tiny_model(family)))
    fields = json.loads(json.dumps(layout.to_dict()))
    assert fields["version"] == 2
    assert ModelLayout.from_dict(fields) == layout


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_dense_to_low_rank_with_the_state_dict_gives_the_model_back(family: str) -> None:
    source, batch = factorise_(tiny_model(family), 5), padded_batch()
    fresh = tiny_model(family, seed=7)
    conform_(fresh, ModelLayout.from_dict(read_layout(source).to_dict()))
    fresh.load_state_dict(source.state_dict())
    assert torch.equal(logits(fresh, batch), logits(source, batch))
    assert read_layout(fresh) == read_layout(source)


def test_low_rank_to_dense_and_to_another_rank() -> None:
    model = factorise_(tiny_model("bert"), 5)
    other = read_layout(factorise_(tiny_model("bert"), 3))
    conform_(model, other)
    assert read_layout(model) == other
    conform_(model, ModelLayout({}))
    assert read_layout(model) == ModelLayout({})
    dense = tiny_model("bert", seed=3)
    model.load_state_dict(dense.state_dict())
    batch = padded_batch()
    assert torch.equal(logits(model, batch), logits(dense, batch))


def test_layers_that_fit_are_not_touched() -> None:
    model = factorise_(tiny_model("bert"), 5)
    before = dict(model.named_modules())
    layout = read_layout(model)
    name = next(iter(layout.modules))
    conform_(model, ModelLayout({**layout.modules, name: low_rank(2)}))
    changed = [key for key, module in model.named_modules() if module is not before[key]]
    assert changed == [name, f"{name}.left", f"{name}.right"]


def test_conforming_keeps_dtype_bias_and_mode() -> None:
    root = nn.Sequential(nn.Linear(4, 4, bias=False, dtype=torch.bfloat16), nn.Linear(4, 4)).train()
    conform_(root, ModelLayout({"0": low_rank(2), "1": low_rank(2)}))
    first, second = root
    assert isinstance(first, LowRankLinear)
    assert isinstance(second, LowRankLinear)
    assert first.left.weight.dtype is torch.bfloat16
    assert first.bias is None
    assert second.bias is not None
    assert first.training
    conform_(root.eval(), ModelLayout({}))
    assert isinstance(root[0], nn.Linear)
    assert root[0].weight.dtype is torch.bfloat16
    assert root[0].bias is None
    assert not root[0].training


@pytest.mark.parametrize(
    ("name", "kind", "found", "error"),
    [
        ("encoder.9", "low_rank", "nothing", CheckpointMismatchError),
        ("1", "low_rank", "Tanh", CheckpointMismatchError),
        ("0", "woven", "'singular_groups'", UnknownFormError),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_and_changes_nothing(
    name: str, kind: str, found: str, error: type[LowRankError]
) -> None:
    root = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    before = list(root)
    with pytest.raises(error) as caught:
        conform_(root, ModelLayout({"2": low_rank(2), name: {"form": kind, "rank": 2}}), "checkpoint 'x.ckpt'")
    for part in ("checkpoint 'x.ckpt'", repr(name), kind, found):
        assert part in str(caught.value)
    assert all(now is then for now, then in zip(root, before, strict=True))


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_another_version_is_refused(version: Any) -> None:
    fields = {**ModelLayout({}).to_dict(), "version": version}
    with pytest.raises(LayoutVersionError) as caught:
        ModelLayout.from_dict(fields)
    assert f"version {version!r}" in str(caught.value)
    assert "reads versions 1 and 2" in str(caught.value)


def test_a_missing_version_is_refused() -> None:
    with pytest.raises(LayoutVersionError, match="version None"):
        ModelLayout.from_dict({"modules": {}})


def test_difference_is_empty_for_equals_and_names_the_first_otherwise() -> None:
    mine = ModelLayout({"a": low_rank(2), "b": low_rank(3)})
    assert mine.difference(ModelLayout(dict(mine.modules))) == ""
    assert mine.difference(ModelLayout({"a": low_rank(2), "b": low_rank(4)})) == (
        "1 layers, e.g. 'b' is low_rank (rank 3) against low_rank (rank 4)"
    )
    assert mine.difference(ModelLayout({})) == "2 layers, e.g. 'a' is low_rank (rank 2) against dense"


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
def test_a_layout_in_groups_tells_capacities_and_survives_json(family: str) -> None:
    model = in_groups_(tiny_model(family))
    layout = read_layout(model)
    assert layout.modules == {n: groups(layer.capacity) for n, layer in svd_layers(model).items()}
    assert set(layout.modules) == set(TargetSelector().select(tiny_model(family)))
    assert ModelLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_dense_to_groups_with_the_state_dict_gives_the_model_back_with_its_ranks(family: str) -> None:
    source, batch = in_groups_(tiny_model(family)), padded_batch()
    fresh = tiny_model(family, seed=7)
    conform_(fresh, read_layout(source))
    fresh.load_state_dict(source.state_dict())
    assert torch.equal(logits(fresh, batch), logits(source, batch))
    ranks = [{name: layer.rank for name, layer in svd_layers(model).items()} for model in (fresh, source)]
    assert ranks[0] == ranks[1]


KINDS: dict[str, Spec | None] = {
    "dense": None,
    "low_rank": low_rank(2),
    "higher": low_rank(3),
    "groups": groups(4),
    "fewer_groups": groups(2),
}


@pytest.mark.parametrize("start", KINDS)
@pytest.mark.parametrize("end", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_conforms_to_every_other(start: str, end: str, bias: bool) -> None:
    layouts = {key: ModelLayout({} if kind is None else {"0": kind}) for key, kind in KINDS.items()}
    root = nn.Sequential(nn.Linear(5, 4, bias, dtype=torch.bfloat16)).eval()
    conform_(root, layouts[start])
    assert read_layout(root) == layouts[start]
    before = root[0]
    conform_(root, layouts[end])
    assert read_layout(root) == layouts[end]
    assert type(root[0]) is {"dense": nn.Linear, "low_rank": LowRankLinear, "higher": LowRankLinear}.get(end, SVDLinear)
    assert (root[0] is before) is (start == end)
    assert any(key.endswith("bias") for key in root.state_dict()) is bias
    assert {parameter.dtype for parameter in root.parameters()} == {torch.bfloat16}
    assert not root[0].training


def test_a_fitting_layer_in_groups_keeps_its_rank_and_values() -> None:
    layer = SVDLinear.from_linear(nn.Linear(5, 4))
    layer.rank = 2
    root = nn.Sequential(layer)
    conform_(root, ModelLayout({"0": groups(4)}))
    assert root[0] is layer
    assert layer.rank == 2


@pytest.mark.parametrize("every", [0, 1, 3], ids=["none_dense", "all_dense", "some_dense"])
def test_the_compacted_layout_is_the_layout_of_the_compacted_model(every: int) -> None:
    model = in_groups_(tiny_model("bert"))
    names = list(svd_layers(model))
    dense = names[::every] if every else []
    _, layout = compact_state(model.state_dict(), read_layout(model), dense)
    assert layout == read_layout(compact_(model, dense))
    assert len(layout.modules) == len(names) - len(dense)


def test_compacting_a_layout_leaves_low_rank_layers_alone() -> None:
    shrunk = SVDLinear(4, 4, 4)
    shrunk.rank = 3
    root = nn.Sequential(LowRankLinear(4, 4, 2), shrunk, SVDLinear(4, 4, 3))
    before = read_layout(root)
    _, layout = compact_state(root.state_dict(), before, ["0", "2"])
    assert layout == ModelLayout({"0": low_rank(2), "1": low_rank(3)})
    assert before.modules["1"] == groups(4)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "entry", [{}, {"rank": 2}, {"form": 2}, "low_rank", ["woven", 2], ["low_rank"], ["low_rank", "2"], None]
)
def test_an_entry_that_tells_no_form_is_refused_with_the_layer(version: int, entry: Any) -> None:
    with pytest.raises(FormSpecError, match=r"layer 'a\.b' is described by"):
        ModelLayout.from_dict({"version": version, "modules": {"a.b": entry}})


@pytest.mark.parametrize("spec", [{}, {"rank": "2"}, {"rank": 2.5}, {"rank": True}, {"capacity": 2}])
def test_a_form_without_its_size_is_refused_and_changes_nothing(spec: Any) -> None:
    root = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = list(root)
    with pytest.raises(FormSpecError, match="lacks the whole number 'rank'"):
        conform_(root, ModelLayout({"0": low_rank(2), "1": {"form": "low_rank", **spec}}))
    assert all(now is then for now, then in zip(root, before, strict=True))


def test_version_1_is_read() -> None:
    modules = {"a": ["low_rank", 2], "b": ("singular_groups", 4)}
    expected = ModelLayout({"a": low_rank(2), "b": groups(4)})
    assert ModelLayout.from_dict({"version": 1, "modules": modules}) == expected


def test_what_lies_inside_a_form_is_neither_laid_out_nor_conformed() -> None:
    root = nn.Sequential(LowRankLinear(4, 4, 2))
    assert read_layout(root) == ModelLayout({"0": low_rank(2)})
    with pytest.raises(CheckpointMismatchError, match=r"at '0\.left'"):
        conform_(root, ModelLayout({"0": low_rank(2), "0.left": low_rank(1)}))
