"""Whether weights, data and tokenizer belong together: refusals before any long work."""

from __future__ import annotations

import logging

from lowrank_pl.checkpoint import SavedModel
from lowrank_pl.contract import LANGUAGE_MODELLING, TargetSpec
from lowrank_pl.errors.checkpoint import CheckpointMismatchError
from lowrank_pl.hub import load_config

logger = logging.getLogger(__name__)


def check_same_target(saved: SavedModel, target: TargetSpec) -> None:
    """Raises an error for a head of another size or kind, or with its classes in another order than the data's."""
    if target.kind in LANGUAGE_MODELLING:
        if saved.target is not None and saved.target.kind != target.kind:
            problem = f"it was trained for {saved.target.kind}, the data {target.name!r} are for {target.kind}"
            raise CheckpointMismatchError(saved.source, problem)
        return
    names, told = target.label_names, saved.label_names
    count = len(told) if told else 1
    if (saved.target is not None and saved.target.kind != target.kind) or count != max(len(names), 1):
        name, kind = (saved.target.name, saved.target.kind) if saved.target else ("a model folder", "head")
        raise CheckpointMismatchError(
            saved.source,
            f"it predicts {count} labels of {name!r} ({kind}), "
            f"the data {target.name!r} have {len(names)} ({target.kind})",
        )
    if set(told) == set(names) and told != names:
        raise CheckpointMismatchError(
            saved.source, f"its classes stand in the order {list(told)}, the data's in the order {list(names)}"
        )
    if told != names and not all(label.startswith("LABEL_") for label in told):
        logger.warning("%s was trained on labels %s, the data have %s", saved.source, told, names)


def check_same_architecture(saved: SavedModel, pretrained: str) -> None:
    """Raises an error for weights that do not belong to the tokenizer of `pretrained`."""
    config = load_config(pretrained)
    own, other = ((c.model_type, c.vocab_size) for c in (saved.config, config))
    if own != other:
        raise CheckpointMismatchError(
            saved.source,
            f"it is a {own[0]} with {own[1]} tokens, while pretrained={pretrained!r}, which the tokenizer comes from, "
            f"is a {other[0]} with {other[1]}",
        )
