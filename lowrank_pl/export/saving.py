"""Writing a factorised Hugging Face model that is in memory, whoever has made it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.checkpoint import auto_classes_making, factorised_class, is_quantized
from lowrank_pl.errors.export import NotSavableError
from lowrank_pl.export.card import plain_card
from lowrank_pl.export.folder import check_finite_weights, check_tokenizer, sharding_of
from lowrank_pl.files import OutputFolder
from lowrank_pl.nn import forms_in


class Savable(Protocol):
    """A tokenizer, an image processor or a feature extractor of transformers."""

    def save_pretrained(self, save_directory: str, /) -> Any:
        """Writes its files."""
        ...


def save_pretrained(
    model: nn.Module,
    folder: str,
    tokenizer: Savable | None = None,
    overwrite: bool = False,
    max_shard_size: str | None = None,
) -> Path:
    """Writes a factorised model of transformers as a folder that loads again, unlike the model's own method.

    The folder is like that of `export` in the factorised form: factors are kept, `lowrank_pl.from_pretrained` gives the
    same model to the last bit, and `AutoModelFor….from_pretrained(folder, trust_remote_code=True)` needs no lowrank_pl.
    It appears as a whole or not at all. The model is left as it is.

    Args:
        model: Of a class of transformers, e.g. `BertForSequenceClassification`, whatever has factorised its layers.
        folder: Must be new or empty.
        tokenizer: Written beside the model: a tokenizer, or a processor of images or sound.
        overwrite: Replace a folder that exists, with everything that is in it.
        max_shard_size: Split larger weights into files of at most this size, e.g. `"5GB"`; by default that of
            transformers.

    Returns:
        The folder.

    Raises:
        NotSavableError: it is no class of transformers', or a layer is still in a form of training.
        UntoldChangeError: its configuration makes another model, with another head for instance.
        OutputExistsError, OutputNotWritableError: see `folder` and `overwrite`.
        CheckpointMismatchError: the tokenizer has tokens that the model has no embedding for.
        NonFiniteWeightsError: a weight is NaN or Inf.
        RangeError: `max_shard_size` is no size, or the model is in eight bits, which is one file.
    """
    output, sharding = OutputFolder(folder, overwrite), sharding_of(max_shard_size, one_file=is_quantized(model))
    base = _architecture(model)
    assert isinstance(model, PreTrainedModel)
    _check_forms(model)
    output.check()
    check_finite_weights(model, base.__name__)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        check_tokenizer(tokenizer, model.config, base.__name__)
    written = copy.copy(model)  # shares the weights; class and configuration are to be others
    written.__class__ = factorised_class(base, next(iter(auto_classes_making(base, type(model.config))), None))
    written.config = copy.deepcopy(model.config)
    with output.written_whole() as temporary:
        written.save_pretrained(temporary, **sharding)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        (temporary / "README.md").write_text(plain_card(written), encoding="utf-8")
    return output.path


def _architecture(model: nn.Module) -> type[PreTrainedModel]:
    """The class of transformers that a model is of; a subclass of it may compute something else.

    Raises:
        NotSavableError: it is none.
    """
    kind = type(model)
    found = next((c for c in kind.__mro__ if c.__module__.startswith("transformers.models.")), None)
    # What `from_pretrained` has made is of a class of this package directly below one of transformers.
    own = kind.__module__ == factorised_class.__module__
    if found is None or not issubclass(found, PreTrainedModel) or (kind is not found and not own):
        raise NotSavableError(kind.__name__, "its class is none of transformers' own")
    return found


def _check_forms(model: nn.Module) -> None:
    """Raises `NotSavableError` for a layer whose form is one of training."""
    for name, layer in forms_in(model).items():
        if not layer.is_final:
            raise NotSavableError(type(model).__name__, f"its layer {name!r} is still in the form {layer.name!r}")
