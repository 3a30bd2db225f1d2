"""Where pre-trained encoders and tokenizers come from: the hub, a folder, or an installed package."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from lowrank_pl.errors.checkpoint import CheckpointMismatchError
from lowrank_pl.errors.pretrained import (
    HubUnreachableError,
    ModelFolderError,
    NotADecoderError,
    PackageModelError,
    UnsupportedModelError,
)
from lowrank_pl.files.checksums import CHECKSUMS, verify_checksums
from lowrank_pl.files.weight_files import INDEX, SINGLE, weight_files

_PACKAGE_PREFIX = "pkg://"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "spm.model")


def resolve_pretrained(name: str) -> str:
    """Turns what a user wrote into what `from_pretrained` takes.

    Args:
        name: A folder, a hub id (`org/model` or `model`), or `pkg://module/sub/folder` for a model carried by
            an installed Python package. The package is located, not imported.

    Returns:
        An existing folder that has a `config.json`, or the hub id unchanged.

    Raises:
        PackageModelError: the package or the folder inside it does not exist.
        ModelFolderError: the folder exists and holds no `config.json`.
        HubUnreachableError: it looks like a path (starts with `.`, `/` or `~`) and does not exist.
    """
    if name.startswith(_PACKAGE_PREFIX):
        folder = _package_folder(name)
    else:
        folder = Path(name).expanduser()
        if not folder.exists():
            if name.startswith((".", "/", "~")) or name.count("/") > 1:
                raise HubUnreachableError(name, "no such file or folder, and not the form of a hub id")
            return name
    if not folder.is_dir():
        raise ModelFolderError(str(folder), "content: it is a file", [])
    _require(folder, ("config.json",), "config.json")
    return str(folder)


def lasting_name(name: str) -> str:
    """The same model's name for a run in another working folder: a folder with its whole path, others as they are."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def require_weights(name: str) -> None:
    """Raises an error for a folder without weights; see `resolve_pretrained` for `name` and further errors.

    Raises:
        ModelFolderError: a folder without weights.
    """
    source = resolve_pretrained(name)
    if Path(source).is_dir():
        _require(Path(source), _WEIGHTS, "weights (model.safetensors, …)")


def _package_folder(address: str) -> Path:
    module, _, inside = address.removeprefix(_PACKAGE_PREFIX).partition("/")
    try:
        spec = importlib.util.find_spec(module) if module else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise PackageModelError(address, f"the package {module!r} is not installed")
    folder = Path(spec.submodule_search_locations[0]) / inside
    if not folder.is_dir():
        raise PackageModelError(address, f"{module!r} is installed but has no folder {inside!r}")
    return folder


def load_exactly(auto_class: Any, folder: str, config: Any, as_saved: bool = False) -> PreTrainedModel:
    """Loads a dense model from a folder, head included, in train mode: every key and shape must match.

    Goes through `from_pretrained`, which knows the names that older files use.

    Args:
        auto_class: `AutoModelForSequenceClassification` or another Auto class.
        folder: With config.json and weights.
        config: Of the model.
        as_saved: Whether parameters get the dtype that the folder tells, instead of torch's default.

    Raises:
        CheckpointMismatchError: a key is missing or unexpected, or a shape differs.
        ModelFolderError: the weights cannot be read.
        UnsupportedModelError: the architecture has no such head.
    """
    check_supported(auto_class, folder, config)
    try:
        with _quiet():
            model, info = auto_class.from_pretrained(
                folder,
                config=config,
                dtype="auto" if as_saved else torch.get_default_dtype(),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(folder, f"readable weights ({first_line(error)})", _names(folder)) from error
    for key, theirs, ours in sorted(info["mismatched_keys"]):
        raise CheckpointMismatchError(folder, f"{key!r} is {list(theirs)} there and {list(ours)} here")
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing or unexpected:
        raise CheckpointMismatchError.keys(folder, missing, unexpected)
    encoder: PreTrainedModel = model.train()
    return encoder


def _names(folder: str) -> list[str]:
    return [entry.name for entry in Path(folder).iterdir()]


def _require(folder: Path, names: tuple[str, ...], what: str) -> None:
    found = _names(str(folder))
    if not any(name in found for name in names):
        raise ModelFolderError(str(folder), what, found)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that belongs to a model.

    Args:
        name: As in `resolve_pretrained`.

    Raises:
        ModelFolderError: a folder without tokenizer files.
        HubUnreachableError: a hub id that cannot be fetched.
        UnsupportedModelError: the model reads no text.
    """
    source = resolve_pretrained(name)
    _check_reads_text(name, source)
    if Path(source).is_dir():
        _require(Path(source), _TOKENIZER, "tokenizer (tokenizer.json, vocab.txt, …)")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise ModelFolderError(source, f"usable tokenizer ({first_line(error)})", _names(source)) from error
        raise HubUnreachableError(name, first_line(error)) from error
    return tokenizer


def _check_reads_text(name: str, source: str) -> None:
    """Raises an error for a folder of a model that no tokenizer belongs to, such as one for pictures or sound."""
    if not Path(source).is_dir():
        return
    config = load_config(source)
    if not _is_of_text(config) and not any(file in _names(source) for file in _TOKENIZER):
        raise UnsupportedModelError(name, config.model_type, None, reads_text=False)


def _is_of_text(config: Any) -> bool:
    """Whether an architecture reads text; those of decoders have not all a tokenizer of their own in transformers."""
    decodes = type(config) in getattr(AutoModelForCausalLM, "_model_mapping")  # noqa: B009, set without a type
    return decodes or config.model_type in TOKENIZER_MAPPING_NAMES


def load_config(name: str, **overrides: Any) -> Any:
    """Loads the configuration of a model; see `resolve_pretrained` for `name` and the errors."""
    source = resolve_pretrained(name)
    try:
        return AutoConfig.from_pretrained(source, **overrides)
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise ModelFolderError(source, f"usable config.json ({first_line(error)})", _names(source)) from error
        raise HubUnreachableError(name, first_line(error)) from error


def load_pretrained(auto_class: Any, name: str, **config_overrides: Any) -> tuple[PreTrainedModel, bool]:
    """Loads a pre-trained encoder with a (possibly new) head, in train mode.

    A new head is normal and random; encoder weights that are missing are not, and raise an error.

    Args:
        auto_class: `AutoModelForSequenceClassification` or another Auto class.
        name: As in `resolve_pretrained`.
        config_overrides: Fields of the configuration to set, e.g. `num_labels`.

    Returns:
        The model, and whether parts of it (a head) are freshly initialised.

    Raises:
        ModelFolderError: a folder without weights.
        HubUnreachableError: a hub id that cannot be fetched.
        CheckpointMismatchError: the weights lack parts of the encoder.
        UnsupportedModelError: the architecture has no such head.
        DamagedWeightsError: they are not those that `SHA256SUMS` in the folder lists, where there is one.
    """
    require_weights(name)
    source = resolve_pretrained(name)
    config = load_config(name, **config_overrides)
    check_supported(auto_class, name, config)
    if Path(source).is_dir():
        _verify(Path(source))
    try:
        # Half-precision checkpoints are common and a poor place to fine-tune in; the trainer's precision, which
        # sets torch's default dtype, decides.
        dtype = torch.get_default_dtype()
        with _quiet():
            # A head for other labels is made anew, like any missing head; what else may not fit is judged below.
            model, info = auto_class.from_pretrained(
                source, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except SafetensorError as error:
        raise ModelFolderError(source, f"readable weights ({first_line(error)})", _names(source)) from error
    except OSError as error:
        raise HubUnreachableError(name, first_line(error)) from error
    # A bare encoder's keys have no prefix: all of them are the encoder's.
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    for key, theirs, ours in sorted(info["mismatched_keys"]):
        if key.startswith(prefix):
            raise CheckpointMismatchError(source, f"{key!r} is {list(theirs)} there and {list(ours)} here")
    # Encoders trained as language models have no pooler; classifiers make a new one, like their head.
    missing = sorted(key for key in info["missing_keys"] if key.startswith(prefix) and "pooler" not in key.split("."))
    if missing:
        raise CheckpointMismatchError.keys(f"model folder {source!r}", missing, [])
    # from_pretrained returns eval mode, and Lightning trains a module in the mode it finds it in.
    encoder: PreTrainedModel = model.train()
    return encoder, bool(info["missing_keys"] or info["mismatched_keys"])


def check_supported(auto_class: Any, name: str, config: Any) -> None:
    """Raises an error for an architecture without a head of this kind, such as one for pictures.

    Raises:
        UnsupportedModelError: it has none, or an encoder beside the decoder that predicts the tokens.
        NotADecoderError: it is an encoder, and the head would predict tokens that it sees.
    """
    mapping = getattr(auto_class, "_model_mapping", None)  # a class of one architecture has none
    if mapping is not None and type(config) not in mapping:
        raise UnsupportedModelError(name, config.model_type, auto_class.__name__, _is_of_text(config))
    if auto_class is AutoModelForCausalLM and getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(name, config.model_type, auto_class.__name__, reads_text=True, with_encoder=True)
    if auto_class is AutoModelForCausalLM and _sees_what_follows(config):
        raise NotADecoderError(name, config.model_type)


def _sees_what_follows(config: Any) -> bool:
    """Whether it is an encoder: transformers builds those for next tokens too, and leaves them to see both sides."""
    fills_gaps = type(config) in getattr(AutoModelForMaskedLM, "_model_mapping")  # noqa: B009, set without a type
    return fills_gaps and not getattr(config, "is_decoder", False)


def _verify(folder: Path) -> None:
    """Compares the weights that transformers will read with the checksums that an export has left."""
    # Pickles are not among what is exported; whose checksums they might be is not known.
    if (folder / CHECKSUMS).is_file() and any((folder / name).is_file() for name in (SINGLE, INDEX)):
        verify_checksums(folder, weight_files(folder, "pretrained").names)


def longest_input(model: PreTrainedModel) -> int:
    """How many tokens a model's position embeddings reach; practically no limit where it has none."""
    positions = getattr(model.config, "max_position_embeddings", None) or -1
    positions = 2**31 if positions < 0 else positions  # XLNet says -1
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding index.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            positions -= module.padding_idx + 1
    return int(positions)


@contextmanager
def uninitialised() -> Iterator[None]:
    """Builds models of transformers without drawing random weights, which takes longer than reading real ones.

    For models of which every weight is loaded; `tie_weights` has to be called on them, as transformers ties while it
    initialises.
    """
    with no_init_weights():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Mutes transformers' table of missing and unexpected keys, which `load_pretrained` judges itself."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def first_line(error: BaseException) -> str:
    """What an error of another package says, short enough for a message of this one."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
