"""Turns raw rows into token ids, without padding, and counts what was cut off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lowrank_pl.errors.data import MaxLengthError, MissingTokenError

Rows = dict[str, list[Any]]
LEAST_LENGTH = 8
_NO_LIMIT = 10**6
# Their position ids start after the padding id, so that many of the position embeddings are never used.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")


@dataclass(frozen=True)
class Truncation:
    """How much of a split was cut off at `max_length`.

    Attributes:
        samples: Samples in the split.
        truncated: Samples that were longer.
        longest: Tokens of the longest sample before it was cut, special tokens included.
    """

    samples: int
    truncated: int
    longest: int

    @property
    def share(self) -> float:
        """Truncated samples among all, 0 to 1."""
        return self.truncated / max(self.samples, 1)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str, mask: bool = False, pad: bool = True) -> None:
    """Raises an error for a tokenizer that cannot make batches.

    Args:
        tokenizer: The tokenizer.
        name: Its name, for the error.
        mask: Whether a mask token is needed.
        pad: Whether a pad token is.

    Raises:
        MissingTokenError: it has no pad or mask token where one is needed.
    """
    if pad and tokenizer.pad_token is None:
        raise MissingTokenError(name, "pad")
    if mask and tokenizer.mask_token is None:
        raise MissingTokenError(name, "mask")


def check_length(
    max_length: int,
    tokenizer: PreTrainedTokenizerBase | None,
    config: Any | None,
    argument: str = "max_length",
    multiple: int | None = None,
) -> None:
    """Raises an error for a `max_length` the model cannot take.

    Args:
        max_length: Tokens per sample, special tokens included.
        tokenizer: Knows its own limit, or has none; `None` where the model's alone counts.
        config: The configuration of the model if it is at hand; knows the number of positions.
        argument: The argument that set it, for the error.
        multiple: To which samples of that length are padded.

    Raises:
        MaxLengthError: it is under `LEAST_LENGTH` or above the limit, or padding takes it beyond the positions.
    """
    limits = [] if tokenizer is None or tokenizer.model_max_length >= _NO_LIMIT else [tokenizer.model_max_length]
    positions = getattr(config, "max_position_embeddings", None)
    absolute = getattr(config, "position_biased_input", True) or not getattr(config, "relative_attention", False)
    if isinstance(positions, int) and positions > 0 and absolute:
        offset = (
            (getattr(config, "pad_token_id", 0) or 0) + 1
            if getattr(config, "model_type", "") in _OFFSET_POSITIONS
            else 0
        )
        places = positions - offset
        limits.append(places)
        if multiple is not None and max_length <= places < -(-max_length // multiple) * multiple:
            raise MaxLengthError(max_length, LEAST_LENGTH, places // multiple * multiple, argument, multiple)
    limit = min(limits, default=None)
    if max_length < LEAST_LENGTH or (limit is not None and max_length > limit):
        raise MaxLengthError(max_length, LEAST_LENGTH, limit, argument)


def tokenise(
    dataset: Dataset, encode: Callable[[Rows, bool], Rows], max_length: int, split: str
) -> tuple[Dataset, Truncation]:
    """Encodes a split and counts truncation exactly.

    Args:
        dataset: Raw rows.
        encode: Encodes rows; its second argument says whether to truncate.
        max_length: Where it truncates.
        split: Name for the progress bar.

    Returns:
        The encoded split (model inputs, `labels` if there are any, `length`), and what was cut off.
    """
    longest, truncated = 0, 0

    def encoded(rows: Rows) -> Rows:
        nonlocal longest, truncated
        result = encode(rows, True)
        lengths = [len(ids) for ids in result["input_ids"]]
        longest = max(longest, *lengths)
        # Only a sample that fills max_length can have been cut: count by encoding those few once more, whole.
        full = [at for at, length in enumerate(lengths) if length >= max_length]
        if full:
            whole = encode({name: [values[at] for at in full] for name, values in rows.items()}, False)
            uncut = [len(ids) for ids in whole["input_ids"]]
            longest = max(longest, *uncut)
            truncated += sum(length > max_length for length in uncut)
        return {**result, "length": lengths}

    result = dataset.map(
        encoded,
        batched=True,
        remove_columns=dataset.column_names,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=f"lowrank_pl-{split}",
        desc=f"Tokenising {split}",
    )
    return result, Truncation(len(dataset), truncated, longest)


def encode_texts(tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int, truncate: bool) -> Rows:
    """Encodes `text` and, if there is one, `text_pair`; keeps `labels`.

    Args:
        tokenizer: The tokenizer.
        rows: Raw rows.
        max_length: Tokens per sample, special tokens included.
        truncate: Whether to cut longer samples, the longer sentence of a pair first.
    """
    length = max_length if truncate else None
    encoded = tokenizer(
        rows["text"], rows.get("text_pair"), truncation=truncate, max_length=length, padding=False, verbose=False
    )
    labels = {"labels": rows["labels"]} if "labels" in rows else {}
    return {**encoded, **labels}
