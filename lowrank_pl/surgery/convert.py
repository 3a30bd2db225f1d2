"""Conversions of whole models, and of their state dicts, between the forms of a layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import get_args

from torch import Tensor, nn

from lowrank_pl.errors.checkpoint import CheckpointMismatchError
from lowrank_pl.nn import LayerForm, LinearForm, LowRankLinear, forms_in, restated
from lowrank_pl.nn.final_form import FinalForm, final_form, restated_state
from lowrank_pl.surgery.layout import TRANSPOSED, ModelLayout
from lowrank_pl.surgery.swap import replace_module_
from lowrank_pl.surgery.vocabulary import tied_heads, untie_head_


def densify_(model: nn.Module) -> nn.Module:
    """Multiplies every layer in a form back to the dense layer it stands for, in place; returns the model."""
    forms, ties = forms_in(model), tied_heads(model)
    for name, layer in forms.items():
        if name not in ties:
            replace_module_(model, name, layer.dense())
    for head, vocabulary in ties.items():
        untie_head_(model, head, vocabulary, forms[head].empty_dense())
    return model


def compact_(
    model: nn.Module,
    dense: Collection[str] = (),
    form: type[LinearForm] = LowRankLinear,
    like: nn.Module | None = None,
) -> nn.Module:
    """Brings every layer in a form of training to the form that is deployed, in place; returns the model.

    Parameters are new objects: no optimizer may need them afterwards.

    Args:
        model: The model.
        dense: Names of layers in a form of training that become dense instead.
        form: In which the others end, where their own final form is two factors.
        like: A model that has been compacted so, for an averaged copy of it: parameters stand for the same things.
    """
    for name, layer in forms_in(model).items():
        if layer.is_final:
            continue
        made = layer.dense() if name in dense else layer.compact()
        replace_module_(model, name, restated(made, form, None if like is None else like.get_submodule(name)))
    return model


def compact_state(
    state: Mapping[str, Tensor],
    layout: ModelLayout,
    dense: Collection[str] = (),
    source: str = "the checkpoint",
    forms: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, Tensor], ModelLayout]:
    """What `compact_` would make of a model, from its state dict and layout: the same but for forms of training.

    Args:
        state: Of a model, names as in the model.
        layout: Of the same model.
        dense: Names of layers in a form of training that become dense.
        source: Where it came from, for messages.
        forms: By layer, the name of the `FinalForm` in which it ends where its own final form is two factors.

    Raises:
        UnknownFormError: see `LayerForm.by_name`.
        CheckpointMismatchError: a tensor of such a layer is missing.
    """
    found, modules = dict(state), dict(layout.modules)
    for name, spec in layout.modules.items():
        form = LayerForm.by_name(str(spec["form"]))
        if form.is_final:
            continue
        try:
            final = None if name in dense else form.compact_state(state, name)
            if final is not None and forms.get(name) in get_args(FinalForm):
                final = restated_state(final, final_form(forms[name]))
            if final is None:
                kept = form.dense_state(state, name, bool(spec.get(TRANSPOSED)))
                del modules[name]
            else:
                modules[name] = {"form": final.form.name, **final.spec}
                kept = final.state
        except KeyError as error:
            raise CheckpointMismatchError.keys(source, [f"{name}.{error.args[0]}"], []) from error
        for place in places_of(state, name):
            found = {key: tensor for key, tensor in found.items() if not key.startswith(f"{place}.")}
            found |= {f"{place}.{key}": tensor for key, tensor in kept.items()}
    return found, ModelLayout(modules)


def places_of(state: Mapping[str, Tensor], name: str) -> Iterator[str]:
    """All names of a layer in a state dict: one that a model has in several places shares its tensors there.

    They do so also after a checkpoint has been read.
    """
    yield name
    key = next(key for key in state if key.startswith(f"{name}."))
    inside = key.removeprefix(name)
    for other, tensor in state.items():
        if other != key and other.endswith(inside) and tensor.data_ptr() == state[key].data_ptr() != 0:
            yield other.removesuffix(inside)
