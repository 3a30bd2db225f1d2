"""The forms in which a factorised layer may be deployed, and the way from one to another."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.core.svd import truncated_svd
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.nn.form import Deployed, LinearForm
from lowrank_pl.nn.low_rank_linear import LowRankLinear
from lowrank_pl.nn.pivoted_linear import PivotedLinear
from lowrank_pl.nn.view import empty_dense

FinalForm = Literal["low_rank", "pivoted"]
# By the names in checkpoints: two factors, or pivot rows. A rank is all that each has to tell of itself.


def final_form(name: str) -> type[LinearForm]:
    """The class of a form.

    Raises:
        RangeError: it is none of `FinalForm`.
    """
    if name not in get_args(FinalForm):
        raise RangeError("form", name, " or ".join(map(repr, get_args(FinalForm))))
    form = LinearForm.by_name(name)
    assert issubclass(form, LinearForm)
    return form


def restated(layer: nn.Module, form: type[LinearForm], like: nn.Module | None = None) -> nn.Module:
    """Two factors in another final form of the same function and rank, with new parameters.

    Args:
        layer: Two factors; everything else is given back itself.
        form: One of `FinalForm`.
        like: A layer in that form whose arrangement is taken over, see `LinearForm.assign_like_`.
    """
    if type(layer) is form or not isinstance(layer, LowRankLinear):
        return layer
    made = form.empty(layer.spec(), layer)
    if isinstance(like, form):
        made.assign_like_(layer.factors(), like)
    else:
        made.assign_(layer.factors())
    return made


@torch.no_grad()
def in_two_factors(layer: nn.Module) -> nn.Module:
    """A pivoted layer as two factors of the same function and rank, with new parameters; everything else itself."""
    if not isinstance(layer, PivotedLinear):
        return layer
    made = LowRankLinear.empty(layer.spec(), layer)
    made.assign_(truncated_svd(layer.product(), made.rank))
    return made


def restated_state(final: Deployed, form: type[LinearForm]) -> Deployed:
    """The same of a layer apart from any module."""
    if final.form is form or final.form is not LowRankLinear:
        return final
    weight = final.state["left.weight"]
    shape = LinearShape(weight.shape[0], final.state["right.weight"].shape[1])
    with torch.device("meta"):
        outline = empty_dense(nn.Linear, shape, "left.bias" in final.state, dtype=weight.dtype)
        layer = final.form.empty(final.spec, outline)
    layer.load_state_dict(final.state, assign=True)
    made = restated(layer, form)
    assert isinstance(made, LinearForm)
    return Deployed(form, made.spec(), made.state_dict())
