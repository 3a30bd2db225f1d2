"""Decoders for the harness: looked at before weights are read, loaded one at a time, and watched while asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lowrank_pl.checkpoint import CHECKPOINT_NAME, LAYOUT_KEY, is_quantized, load_model, read_saved_model
from lowrank_pl.checkpoint.entries import BASE_KEY
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.checkpoint import QuantizedModelError
from lowrank_pl.errors.evaluation import NotALanguageModelError, TextStartError
from lowrank_pl.errors.numerics import NonFiniteScoreError
from lowrank_pl.errors.pretrained import NotADecoderError, UnsupportedModelError
from lowrank_pl.export.folder import check_tokenizer
from lowrank_pl.hub import check_supported, load_config, load_tokenizer, require_weights
from lowrank_pl.importance.finite import first_not_finite

_ARGUMENT = "evaluate --models"
_FOR_TOKENS = {"AutoModelForCausalLM", *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}


def check_model(path: str, tokenizer: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that can be evaluated.

    Args:
        path: A checkpoint, the output folder of `compress`, an exported folder, or a dense model as `pretrained` names
            it.
        tokenizer: Where its tokenizer is; `None` for that of the model.

    Raises:
        NotACheckpointError, ModelFolderError, HubUnreachableError, PackageModelError: there is no model, or its
            tokenizer is missing.
        NotALanguageModelError: it predicts no next token.
        MissingArgumentError: a checkpoint that does not tell where its tokenizer is.
        CheckpointMismatchError: the tokenizer has tokens that the model does not know.
        TextStartError: it has none to start a text with.
    """
    location = Path(path).expanduser()
    if location.suffix == ".ckpt" or location.is_file() or (location / CHECKPOINT_NAME).is_file():
        saved = read_saved_model(path, _ARGUMENT)
        config, made_by, own = saved.config, saved.auto_class, saved.tokenizer
    else:
        config, own = load_config(path), path
        made_by = getattr(config, BASE_KEY, None) or next(iter(config.architectures or ()), None)
        if not hasattr(config, LAYOUT_KEY):
            require_weights(path)
    _check_predicts_tokens(path, config, made_by)
    if not (tokenizer or own):
        raise MissingArgumentError(
            f"the tokenizer of {path!r}", "The checkpoint does not tell where it was; give --tokenizer."
        )
    words = load_tokenizer(str(tokenizer or own))
    check_tokenizer(words, config, path)
    if words.bos_token_id is None and words.eos_token_id is None:
        raise TextStartError(words.name_or_path)
    return words


def _check_predicts_tokens(path: str, config: Any, made_by: str | None) -> None:
    try:
        check_supported(AutoModelForCausalLM, path, config)
    except UnsupportedModelError:
        problem = f"the architecture {config.model_type!r} has no head for next tokens"
        raise NotALanguageModelError(path, problem) from None  # which is about training
    except NotADecoderError:
        problem = f"it is an encoder ({config.model_type!r}), in which each token sees those that follow"
        raise NotALanguageModelError(path, problem) from None  # which is about training
    if made_by not in _FOR_TOKENS:
        raise NotALanguageModelError(
            path, f"it has no head for next tokens ({made_by or 'config.json names no class'})"
        )


def load(path: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A model in eval mode, as the verbs of this package load it.

    Its parameters get the data type; what transformers computes in float32 beside them, such as the angles of rotary
    positions, stays as it is.

    Raises:
        QuantizedModelError: a model in eight bits is to compute in another data type than float32.
    """
    model = load_model(path, _ARGUMENT)
    if dtype != torch.float32 and is_quantized(model):
        raise QuantizedModelError(path, f"evaluate --dtype {str(dtype).removeprefix('torch.')}")
    if not is_quantized(model):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    torch.nn.Module.to(model, device=device)
    return model


@contextmanager
def only_finite(model: PreTrainedModel, label: str) -> Iterator[None]:
    """Ends what a model is asked inside as soon as it puts out NaN, which the harness would count as answers.

    Args:
        model: Any decoder.
        label: What it is called.

    Raises:
        NonFiniteScoreError: a logit is NaN, of a place that is not padding as far as a mask tells.
    """

    def check(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        spoiled = output.logits.isnan().any(-1)
        mask = kwargs.get("attention_mask")
        if mask is not None:  # of all tokens so far, where logits are of the new ones
            spoiled = spoiled & mask[:, -spoiled.shape[1] :].bool()
        if not bool(spoiled.any()):
            return
        handle.remove()
        first = first_not_finite(dict(module.named_modules()), lambda: module(*args, **kwargs))
        raise NonFiniteScoreError(f"what {label!r} puts out", first or "", "--dtype float32")

    handle = model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
