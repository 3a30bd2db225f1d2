"""The matrix of a model's vocabulary: where it is, and heads that put out tokens with the same matrix.

v: size of the vocabulary, d: width, r: rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lowrank_pl.errors.targets import VocabularyError
from lowrank_pl.nn import LayerForm, LowRankEmbedding, LowRankLinear, forms_in, is_embedding
from lowrank_pl.surgery.swap import replace_module_

TIED = "tied"
"""In an entry of a layout: the name of the look-up whose factors the layer shares."""

# Of an `nn.Embedding`: by what a value other than the default changes what training does.
_REFUSED = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}


def find_vocabulary(model: nn.Module) -> tuple[str, nn.Module]:
    """The look-up of a model's tokens and its name, dense or factorised.

    Raises:
        VocabularyError: the model tells none, or it is no plain `nn.Embedding`.
    """
    kind = type(model).__name__
    try:
        found = model.get_input_embeddings()  # type: ignore[operator] # a method of transformers' models
    except (AttributeError, NotImplementedError):
        raise VocabularyError(kind, "it has no method get_input_embeddings that returns it") from None
    name = next((name for name, module in model.named_modules() if module is found), None)
    if name is None or not (is_embedding(found) or isinstance(found, LayerForm)):
        raise VocabularyError(kind, f"its get_input_embeddings() returns a {type(found).__name__}")
    for attribute, default in _REFUSED.items():
        if (given := getattr(found, attribute, default)) != default:
            raise VocabularyError(kind, f"{name!r} has {attribute}={given!r}, which two factors do not carry out")
    return name, found


def heads_tied_to(model: nn.Module, name: str) -> list[str]:
    """Names of the linear layers that put out tokens with the matrix of a dense look-up.

    Raises:
        VocabularyError: something else than an `nn.Linear` shares it, or in a way that transformers would not see.
    """
    kind, vocabulary = type(model).__name__, model.get_submodule(name)
    ties = getattr(model, "_tied_weights_keys", None)
    found = []
    for other, module in model.named_modules():
        if module is vocabulary or all(p is not vocabulary.weight for p in module.parameters(recurse=False)):
            continue
        pair = (f"{other}.weight", f"{name}.weight")
        told = ties is None or any(pair in (tie, tie[::-1]) for tie in ties.items())
        if type(module) is not nn.Linear or not told:
            raise VocabularyError(kind, f"{name!r} shares its matrix with {other!r}, a {type(module).__name__}")
        found.append(other)
    return found


def tied_heads(model: nn.Module) -> dict[str, str]:
    """The layers that share the factors of a factorised look-up, and the name of the look-up."""
    forms = forms_in(model)
    owners = {id(form.left.weight): name for name, form in forms.items() if isinstance(form, LowRankEmbedding)}
    return {
        name: owners[id(form.left.weight)]
        for name, form in forms.items()
        if isinstance(form, LowRankLinear) and id(form.left.weight) in owners
    }


def tie_head_(model: nn.Module, head: str, vocabulary: str) -> nn.Module:
    """Lets a head put out `(x rightᵀ) leftᵀ` with the parameters of a factorised look-up; returns the layer before it.

    Args:
        model: The model.
        head: Name of a linear layer `[v, d]`, dense or in two factors.
        vocabulary: Name of the factorised look-up.
    """
    owner = model.get_submodule(vocabulary)
    before = model.get_submodule(head)
    assert isinstance(owner, LowRankEmbedding)
    made = LowRankLinear.like(before, owner.rank)
    made.left.weight, made.right.weight = owner.left.weight, owner.right.weight
    # The object itself, not a copy: it may be tied, too.
    bias: Any = before.bias
    made.left.bias = bias
    replace_module_(model, head, made)
    _rename_ties_(model, lambda ties: _factorised(ties, head, vocabulary))
    return before


def untie_head_(model: nn.Module, head: str, vocabulary: str, dense: nn.Module) -> None:
    """Inverse of `tie_head_` for a look-up that is dense again: gives its matrix to a dense head, and puts that in."""
    form = model.get_submodule(head)
    dense.weight = model.get_submodule(vocabulary).weight
    dense.bias = form.bias
    replace_module_(model, head, dense)
    _rename_ties_(model, lambda ties: _dense(ties, head, vocabulary))


def _rename_ties_(model: nn.Module, renamed: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Keeps up to date what transformers looks up to save and to load tied weights once; other models have no such."""
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        ties = getattr(model, attribute, None)
        if ties:
            setattr(model, attribute, renamed(dict(ties)))


def _factorised(ties: dict[str, str], head: str, vocabulary: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for target, source in ties.items():
        if {target, source} == {f"{head}.weight", f"{vocabulary}.weight"}:
            for part in ("left", "right"):
                found[f"{head}.{part}.weight"] = f"{vocabulary}.{part}.weight"
        else:
            bias, left = f"{head}.bias", f"{head}.left.bias"
            found[left if target == bias else target] = left if source == bias else source
    return found


def _dense(ties: dict[str, str], head: str, vocabulary: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for target, source in ties.items():
        if target == f"{head}.left.weight":
            found[f"{head}.weight"] = f"{vocabulary}.weight"
        elif target != f"{head}.right.weight":
            bias, left = f"{head}.bias", f"{head}.left.bias"
            found[bias if target == left else target] = bias if source == left else source
    return found
