"""What a checkpoint must know about the shapes of a model, so that it loads without any strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lowrank_pl.errors.checkpoint import CheckpointMismatchError, FormSpecError, LayoutVersionError, UnknownFormError
from lowrank_pl.nn import LayerForm, Spec, forms_in, is_dense_linear, is_embedding, outside_forms, shape_of
from lowrank_pl.nn.view import is_transposed
from lowrank_pl.surgery.swap import replace_module_
from lowrank_pl.surgery.vocabulary import TIED, tie_head_, tied_heads

LAYOUT_VERSION = 2
READABLE_VERSIONS = (1, 2)
TRANSPOSED = "transposed"
"""In an entry: the dense layer stores its weight as `[n, m]`."""
# What a version-1 file calls the one number of each form that there was then.
_SIZES = {"low_rank": "rank", "singular_groups": "capacity"}


@dataclass(frozen=True)
class ModelLayout:
    """Form and size of every module that is not what the architecture's own code builds.

    Attributes:
        modules: By fully qualified name the form's `name` and what its `spec()` returns, in one:
            `{"form": "low_rank", "rank": 64}`.
    """

    modules: dict[str, Spec]

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for checkpoints and JSON."""
        return {"version": LAYOUT_VERSION, "modules": {name: dict(spec) for name, spec in self.modules.items()}}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelLayout:
        """Inverse of `to_dict`; reads what earlier versions have written, too.

        Raises:
            LayoutVersionError: written by an incompatible release.
            FormSpecError: a layer's entry lacks its form, or in version 1 not its size.
        """
        version, modules = fields.get("version"), fields.get("modules", {})
        if version not in READABLE_VERSIONS:
            raise LayoutVersionError(version, READABLE_VERSIONS)
        read = _from_version_1 if version == 1 else _from_version_2
        return cls({name: read(name, entry) for name, entry in modules.items()})

    def difference(self, other: ModelLayout) -> str:
        """The first differences to another layout, in words; empty when equal."""
        names = sorted(self.modules.keys() | other.modules.keys())
        different = [n for n in names if self.modules.get(n) != other.modules.get(n)]
        if not different:
            return ""
        name = different[0]
        mine, theirs = (in_words(layout.modules.get(name)) for layout in (self, other))
        return f"{len(different)} layers, e.g. {name!r} is {mine} against {theirs}"


def in_words(spec: Spec | None) -> str:
    """An entry of a layout for messages: `low_rank (rank 64)`; `dense` for none."""
    if spec is None:
        return "dense"
    sizes = ", ".join(f"{key} {value}" for key, value in spec.items() if key != "form")
    return f"{spec['form']} ({sizes})" if sizes else str(spec["form"])


def read_layout(model: nn.Module) -> ModelLayout:
    """Reads the layout off a model."""
    ties = tied_heads(model)
    entries = {name: _entry(layer) for name, layer in forms_in(model).items()}
    return ModelLayout({n: {**entry, **({TIED: ties[n]} if n in ties else {})} for n, entry in entries.items()})


def conform_(model: nn.Module, layout: ModelLayout, source: str = "the checkpoint") -> None:
    """Gives a model the shapes of a layout, in place; values are left to the state dict that follows.

    Layers that already have the right shape are not touched. No optimizer may exist.

    Raises:
        CheckpointMismatchError: the layout names a module that the model lacks or that is no linear layer.
        UnknownFormError: a layer has a form that is not defined here.
        FormSpecError, RankError: a layer has a size that its form cannot have.
    """
    modules = {name: m for name, m in outside_forms(model) if _can_change(m)}
    everything = dict(model.named_modules())
    for name, spec in layout.modules.items():
        fits = name in modules and _form_of(spec, name, source).stands_for is type(shape_of(modules[name]))
        if not fits:
            found = type(everything[name]).__name__ if name in everything else "nothing"
            problem = f"it has a layer of form {spec['form']!r} at {name!r}, where the model has {found}"
            raise CheckpointMismatchError(source, problem)
    present, replacements = read_layout(model).modules, {}
    tied = {name: str(spec[TIED]) for name, spec in layout.modules.items() if TIED in spec}
    for name, module in modules.items():
        if present.get(name) != (wanted := layout.modules.get(name)) and name not in tied:
            replacements[name] = _empty(module, wanted, name, source)
    for name, replacement in replacements.items():
        replace_module_(model, name, replacement)
    for head, vocabulary in tied.items():
        if tied_heads(model).get(head) != vocabulary:
            tie_head_(model, head, vocabulary)


def _from_version_1(name: str, entry: Any) -> Spec:
    kind, size = entry if isinstance(entry, (list, tuple)) and len(entry) == 2 else (None, None)
    if kind not in _SIZES or not isinstance(size, int):
        raise FormSpecError(entry, f"a kind out of {sorted(_SIZES)} and a whole number", name)
    return {"form": kind, _SIZES[kind]: size}


def _from_version_2(name: str, entry: Any) -> Spec:
    if not isinstance(entry, dict) or not isinstance(entry.get("form"), str):
        raise FormSpecError(entry, "the string 'form'", name)
    return dict(entry)


def _can_change(module: nn.Module) -> bool:
    return isinstance(module, LayerForm) or is_dense_linear(module) or is_embedding(module)


def _form_of(spec: Spec, name: str, source: str) -> type[LayerForm]:
    try:
        return LayerForm.by_name(str(spec["form"]))
    except UnknownFormError as error:
        raise UnknownFormError(error.given, error.known, name, source) from None


def _entry(layer: LayerForm) -> Spec:
    # A form of training may become dense again where there is nothing but a file.
    transposed = not layer.is_final and is_transposed(layer.dense_class)
    return {"form": layer.name, **layer.spec(), **({TRANSPOSED: 1} if transposed else {})}


def _empty(module: nn.Module, wanted: Spec | None, name: str, source: str) -> nn.Module:
    """An empty layer of a form and size, in the place of another."""
    if wanted is None:
        assert isinstance(module, LayerForm)
        return module.empty_dense()
    spec = {key: value for key, value in wanted.items() if key not in ("form", TRANSPOSED, TIED)}
    return _form_of(wanted, name, source).empty(spec, module)
