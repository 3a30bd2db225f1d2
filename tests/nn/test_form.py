"""What every form of a linear layer promises. n = 5 inputs, m = 4 outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_pl.core import Factors, LinearShape, truncated_svd
from lowrank_pl.errors.checkpoint import FormSpecError, UnknownFormError
from lowrank_pl.errors.numerics import RankError, ShapeError
from lowrank_pl.nn import (
    Deployed,
    ElasticLinear,
    LinearForm,
    LowRankLinear,
    PivotedLinear,
    Spec,
    SVDLinear,
    dense_weight,
    forms_in,
    outside_forms,
    whole_number,
)
from lowrank_pl.surgery import TargetSelector, compact_, compact_state, conform_, densify_, read_layout
from tests.core.matrices import random_matrix

FORMS: list[tuple[type[LinearForm], Spec]] = [
    (LowRankLinear, {"rank": 3}),
    (SVDLinear, {"capacity": 3}),
    (PivotedLinear, {"rank": 3}),
]
sized_form = pytest.mark.parametrize(("form", "spec"), FORMS)
every_form = pytest.mark.parametrize(("form", "spec"), [*FORMS, (ElasticLinear, {})])


class Gathered(LinearForm):
    """A form from elsewhere: `W = left core`, where training has `core` as a sum of two matrices."""

    name = "gathered"
    is_final = False

    def __init__(self, shape: LinearShape, rank: int, bias: bool, **kind: Any) -> None:
        super().__init__(shape.in_features, shape.out_features)
        self.left = nn.Parameter(torch.zeros(shape.out_features, rank, **kind))
        self.cores = nn.Parameter(torch.zeros(2, rank, shape.in_features, **kind))
        self.register_parameter("bias", nn.Parameter(torch.zeros(shape.out_features, **kind)) if bias else None)

    def spec(self) -> Spec:
        return {"rank": self.left.shape[1]}

    @classmethod
    def build(
        cls, spec: Mapping[str, Any], shape: LinearShape, bias: bool, device: torch.device, dtype: torch.dtype
    ) -> Gathered:
        return cls(shape, whole_number(cls.name, spec, "rank"), bias, device=device, dtype=dtype)

    @classmethod
    def rank_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        return whole_number(cls.name, spec, "rank")

    @classmethod
    def parameters_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        return cls.rank_of(spec, shape) * (shape.out_features + 2 * shape.in_features)

    def assign_(self, factors: Factors) -> None:
        left, right = factors.balanced()
        self.left.data.copy_(left)
        self.cores.data.copy_(right / 2)

    def product(self) -> Tensor:
        return self.left @ self.cores.sum(0)

    @classmethod
    def product_of(cls, state: Mapping[str, Tensor]) -> Tensor:
        return state["left"] @ state["cores"].sum(0)

    @classmethod
    def deployed(cls, state: Mapping[str, Tensor]) -> Deployed:
        kept = {"left.weight": state["left"], "right.weight": state["cores"].sum(0)}
        bias = {"left.bias": state["bias"]} if "bias" in state else {}
        return Deployed(LowRankLinear, {"rank": state["left"].shape[1]}, kept | bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.product(), self.bias)


def dense(bias: bool = True, kind: type[nn.Module] = nn.Linear) -> nn.Module:
    layer = Conv1D(4, 5) if kind is Conv1D else nn.Linear(5, 4, bias)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(random_matrix(*parameter.shape, seed=seed))
    return layer


def filled(form: type[LinearForm], spec: Spec, like: nn.Module) -> LinearForm:
    layer = form.empty(spec, like)
    rank = 2 if form is ElasticLinear else layer.rank  # as much as there is room for
    layer.assign_(truncated_svd(dense_weight(like).detach(), rank))
    return layer


def test_forms_are_found_by_the_name_in_checkpoints() -> None:
    assert LinearForm.by_name("low_rank") is LowRankLinear
    assert LinearForm.by_name("singular_groups") is SVDLinear
    assert LinearForm.by_name("gathered") is Gathered
    with pytest.raises(UnknownFormError, match=r"'woven' is unknown; known are .*'low_rank'"):
        LinearForm.by_name("woven")


@every_form
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_an_empty_layer_stands_in_the_place_of_another(
    form: type[LinearForm], spec: Spec, kind: type[nn.Module]
) -> None:
    like = dense(kind=kind).double().eval()
    made = form.empty(spec, like)
    assert made.spec() == spec
    assert made.shape == LinearShape(4, 5)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float64}
    assert not made.training
    assert not made.product().any()
    assert made.bias is not None
    assert torch.equal(made.bias, like.get_parameter("bias"))
    assert made.bias.data_ptr() != like.get_parameter("bias").data_ptr()
    assert made.dense_class is kind
    again = LowRankLinear.empty({"rank": 2}, made)
    assert again.dense_class is kind
    assert type(again.empty_dense()) is kind


@every_form
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_flags_of_weight_and_bias_go_with_every_conversion(
    form: type[LinearForm], spec: Spec, weight: bool, bias: bool
) -> None:
    like = dense()
    like.get_parameter("weight").requires_grad_(weight)
    like.get_parameter("bias").requires_grad_(bias)
    made = filled(form, spec, like)
    for layer in (made, made.compact()):
        flags = {id(p): p.requires_grad for p in layer.parameters()}
        assert flags.pop(id(layer.bias)) is bias
        assert set(flags.values()) == {weight}
    back = made.dense()
    assert back.get_parameter("weight").requires_grad is weight
    assert back.get_parameter("bias").requires_grad is bias


@every_form
def test_nothing_random_is_drawn(form: type[LinearForm], spec: Spec) -> None:
    like, before = dense(kind=Conv1D), torch.get_rng_state()
    filled(form, spec, like).compact()
    filled(form, spec, like).empty_dense()
    LowRankLinear(5, 4, 2).empty_dense()
    assert torch.equal(torch.get_rng_state(), before)


@every_form
@pytest.mark.parametrize("bias", [True, False])
def test_module_and_state_agree(form: type[LinearForm], spec: Spec, bias: bool) -> None:
    layer = filled(form, spec, dense(bias))
    state = {f"a.{name}": tensor for name, tensor in layer.state_dict().items()}
    back = form.dense_state(state, "a")
    assert back.keys() == layer.dense().state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in layer.dense().state_dict().items())
    assert torch.equal(back["weight"], layer.product().detach())
    if form.is_final:
        assert layer.compact() is layer
        return
    final, compact = form.compact_state(state, "a"), layer.compact()
    assert final is not None
    assert isinstance(compact, LinearForm)
    assert (final.form, final.spec) == (type(compact), compact.spec())
    assert compact.is_final
    assert final.state.keys() == compact.state_dict().keys()
    assert all(torch.equal(final.state[name], tensor) for name, tensor in compact.state_dict().items())


@sized_form
def test_costs_are_those_of_the_parameters(form: type[LinearForm], spec: Spec) -> None:
    made = form.empty(spec, dense(bias=False))
    assert form.parameters_of(spec, LinearShape(4, 5)) == sum(p.numel() for p in made.parameters())
    assert form.flops_of(spec, LinearShape(4, 5)) == 2 * 3 * (4 + 5 - (3 if form is PivotedLinear else 0))
    assert form.rank_of(spec, LinearShape(4, 5)) == made.rank == 3


@sized_form
def test_bad_sizes_and_factors_are_refused(form: type[LinearForm], spec: Spec) -> None:
    with pytest.raises(FormSpecError, match=f"lacks the whole number '{next(iter(spec))}'"):
        form.empty({}, dense())
    with pytest.raises(RankError):
        form.empty(dict.fromkeys(spec, 9), dense())
    with pytest.raises(ShapeError, match=r"factors\.left"):
        form.empty(spec, dense()).assign_(truncated_svd(random_matrix(4, 5), 2))


def test_a_form_from_elsewhere_is_laid_out_loaded_compacted_and_multiplied_back() -> None:
    like = dense()
    root = nn.Sequential(filled(Gathered, {"rank": 2}, like), nn.Tanh())
    x, layout = random_matrix(3, 5, seed=9), read_layout(root)
    assert layout.modules == {"0": {"form": "gathered", "rank": 2}}
    fresh = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
    conform_(fresh, layout)
    fresh.load_state_dict(root.state_dict())
    assert torch.equal(fresh(x), root(x))
    state, compacted = compact_state(root.state_dict(), layout)
    expected = densify_(nn.Sequential(filled(Gathered, {"rank": 2}, like), nn.Tanh()))(x)
    compact_(root)
    assert read_layout(root) == compacted
    assert type(root[0]) is LowRankLinear
    assert all(torch.equal(state[name], tensor) for name, tensor in root.state_dict().items())
    torch.testing.assert_close(root(x), fresh(x))
    torch.testing.assert_close(expected, fresh(x))


def test_what_lies_inside_a_form_is_not_looked_at() -> None:
    block = nn.Sequential(LowRankLinear(4, 4, 2), nn.Linear(4, 4))
    model = nn.Module()
    model.blocks = nn.ModuleList([block, SVDLinear(4, 4, 2)])
    names = [name for name, _ in outside_forms(model)]
    assert names == ["", "blocks", "blocks.0", "blocks.0.0", "blocks.0.1", "blocks.1"]
    assert list(forms_in(model)) == ["blocks.0.0", "blocks.1"]
    assert list(forms_in(block[0])) == [""]
    assert list(TargetSelector().select(model)) == list(TargetSelector().explain(model)) == ["blocks.0.1"]
