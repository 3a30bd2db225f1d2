"""Which linear layers of a model are factorised, whether its vocabulary is, and why the others are not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lowrank_pl.core.shapes import EmbeddingShape, LinearShape
from lowrank_pl.errors.targets import AlreadyFactorisedError, NoTargetError, TiedWeightError
from lowrank_pl.nn import LayerForm, dense_shape, forms_in, is_dense_linear, is_embedding, outside_forms, shape_of
from lowrank_pl.surgery.vocabulary import find_vocabulary, heads_tied_to, tied_heads

TARGETED = "targeted"
_MUCH = 0.2
"""Share of the weights inside the blocks that is worth a word when no target holds it."""


class TargetSelector:
    """Selects dense linear layers (`nn.Linear`, transformers' `Conv1D`) by their fully qualified names.

    Args:
        include: Globs of names (`*` also crosses dots), e.g. `["*.attention.*", "*.intermediate.dense"]`. The
            default takes every linear inside a transformer block, that is below a numbered entry of an
            `nn.ModuleList`: embeddings, pooler and heads stay dense, as in the papers.
        exclude: Globs of names to leave dense, applied after `include`.
        embeddings: Whether the vocabulary's matrix is factorised, too, whatever `include` says: that of
            `get_input_embeddings()`, never those of positions or token types. What a `keep_ratio` is a share of then
            counts it, and a head that is tied to it shares its factors.
    """

    def __init__(
        self, include: list[str] | None = None, exclude: list[str] | None = None, embeddings: bool = False
    ) -> None:
        self.include = include
        self.exclude: Sequence[str] = exclude or []
        self.embeddings = embeddings

    def select(self, model: nn.Module) -> dict[str, nn.Module]:
        """Returns the targets in module order; a module with several names appears once, under its first.

        A glob that matches no module is warned of, and so are blocks much of whose weights are in no linear layer, such
        as experts that are one parameter of three dimensions.

        Raises:
            NoTargetError: nothing matches.
            TiedWeightError: a target shares its weight with another module.
            VocabularyError: the vocabulary is asked for and cannot be factorised.
        """
        reasons = self.explain(model)
        modules = dict(model.named_modules())
        targets = {name: module for name, module in self._candidates(model) if reasons[name] == TARGETED}
        if not targets:
            raise NoTargetError(type(model).__name__, self.include, self.exclude, list(reasons), len(forms_in(model)))
        self._tell_unmatched(type(model).__name__, list(modules))
        if self.include is None:
            _tell_left_dense(model)
        self._refuse_tied({name: layer for name, layer in targets.items() if not is_embedding(layer)}, modules)
        for name, layer in targets.items():
            if is_embedding(layer):
                heads_tied_to(model, name)
        return targets

    def check_dense(self, model: nn.Module) -> None:
        """Raises an error for a selection that names layers which are factorised already, beside dense ones.

        A budget would be a share of what is still dense, and the others would be missing from the report. Whoever wants
        that names the dense layers alone, by `include` or `exclude`.

        Raises:
            AlreadyFactorisedError: some are.
        """
        tied = tied_heads(model)
        forms = {name: form for name, form in forms_in(model).items() if name not in tied}
        blocks = tuple(_block_prefixes(model))
        named = [name for name, form in forms.items() if self._reason(name, form, blocks) == TARGETED]
        dense = [name for name, reason in self.explain(model).items() if reason == TARGETED]
        if named and dense:
            raise AlreadyFactorisedError(type(model).__name__, named, dense)

    def explain(self, model: nn.Module) -> dict[str, str]:
        """For every linear of the model, and the vocabulary if it is asked for: `"targeted"`, or why it stays dense."""
        blocks = tuple(_block_prefixes(model))
        return {name: self._reason(name, layer, blocks) for name, layer in self._candidates(model)}

    def _reason(self, name: str, layer: nn.Module, blocks: tuple[str, ...]) -> str:
        if excluded := [glob for glob in self.exclude if fnmatchcase(name, glob)]:
            return f"excluded by {excluded[0]!r}"
        if type(shape_of(layer)) is EmbeddingShape:
            return TARGETED if self.embeddings else "an embedding"
        if self.include is not None:
            return TARGETED if any(fnmatchcase(name, glob) for glob in self.include) else "not matched by include"
        return TARGETED if name.startswith(blocks) else "outside the transformer blocks"

    def _candidates(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The linears in module order, and before them the vocabulary."""
        vocabulary = [find_vocabulary(model)] if self.embeddings else []
        return [*(found for found in vocabulary if is_embedding(found[1])), *_linears(model)]

    def _tell_unmatched(self, model: str, names: Sequence[str]) -> None:
        """Warns of globs that match no module: they are often parts of a name, and globs are of whole ones."""
        for argument, globs in {"include": self.include or (), "exclude": self.exclude}.items():
            for glob in globs:
                if any(fnmatchcase(name, glob) for name in names):
                    continue
                wider = f"*{glob.strip('*')}*"
                meant = f" Is {wider!r} meant?" if any(fnmatchcase(name, wider) for name in names) else ""
                warnings.warn(
                    f"targets.{argument} {glob!r} matches nothing in {model}: globs are of whole names, and capitals "
                    f"count.{meant}",
                    stacklevel=2,
                )

    @staticmethod
    def shapes(targets: Mapping[str, nn.Module]) -> dict[str, LinearShape]:
        """The shapes of selected layers."""
        return {name: dense_shape(layer) for name, layer in targets.items()}

    @staticmethod
    def _refuse_tied(targets: dict[str, nn.Module], modules: dict[str, nn.Module]) -> None:
        owners: dict[int, str] = {id(layer.weight): name for name, layer in targets.items()}
        for name, module in modules.items():
            for parameter in module.parameters(recurse=False):
                owner = owners.get(id(parameter))
                if owner is not None and owner != name:
                    raise TiedWeightError(owner, name)


def _tell_left_dense(model: nn.Module) -> None:
    """Warns of matrices inside the blocks that are in modules of other kinds, if they are a good part of the blocks."""
    blocks = tuple(_block_prefixes(model))
    inside = [(name, module) for name, module in outside_forms(model) if name.startswith(blocks)]
    linear = {name: shape_of(m).dense_params for name, m in inside if is_dense_linear(m) or isinstance(m, LayerForm)}
    others = {
        f"{name}.{own}": parameter
        for name, module in inside
        if name not in linear and not isinstance(module, nn.Embedding)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    }
    dense, counted = sum(parameter.numel() for parameter in others.values()), sum(linear.values())
    if dense <= _MUCH * (dense + counted):
        return
    name, largest = max(others.items(), key=lambda item: item[1].numel())
    warnings.warn(
        f"{type(model).__name__} has {dense:,} weights inside its blocks that are in no plain nn.Linear, beside "
        f"{counted:,} that are: they stay dense, and keep_ratio is not a share of them. The largest is {name!r} "
        f"{list(largest.shape)}.",
        stacklevel=2,
    )


def _linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    # The thin linears inside a factorised layer are no targets.
    return [(name, module) for name, module in outside_forms(model) if is_dense_linear(module)]


def _block_prefixes(model: nn.Module) -> list[str]:
    """Name prefixes of the entries of every outermost `nn.ModuleList`."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [f"{name}." for name in outermost]
