"""Makes a batch of tensors from tokenised samples; b samples, t tokens of the longest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from lowrank_pl.contract import TargetKind

Sample = dict[str, Any]
Collator = Callable[[list[Sample]], dict[str, Tensor]]

IGNORED = -100
"""The label of a token that has none; PyTorch's losses leave it out."""


class PadCollator:
    """Pads to the longest sample of the batch.

    Args:
        tokenizer: Knows the pad token and the side to pad on.
        kind: What is predicted; decides whether labels are padded too.
        pad_to_multiple_of: Rounds t up.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, kind: TargetKind, pad_to_multiple_of: int | None = None
    ) -> None:
        pad = DataCollatorForTokenClassification if kind == "token_classification" else DataCollatorWithPadding
        self._pad = pad(tokenizer, pad_to_multiple_of=pad_to_multiple_of)

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Returns model inputs (b, t) and, if the samples have them, `labels`."""
        return dict(self._pad(_without_length(samples)))


class FreshMasking:
    """Masks tokens at random, differently each time: the training of a masked language model.

    Args:
        tokenizer: Must have a mask token.
        probability: Share of the tokens to predict.
        pad_to_multiple_of: Rounds t up.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, probability: float, pad_to_multiple_of: int | None = None
    ) -> None:
        self._mask = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=probability, pad_to_multiple_of=pad_to_multiple_of
        )

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Returns model inputs (b, t) and `labels` (b, t), `IGNORED` where nothing is to be predicted."""
        return dict(self._mask(_without_length(samples)))


class FixedMasking:
    """Masks tokens by content and seed: a sample looks the same in every batch, epoch and process.

    As in training, 80 % of the chosen tokens become the mask token, 10 % a random one, 10 % stay. At least one
    token of a sample is chosen, so that no batch is without a loss.

    Args:
        tokenizer: Must have a mask token.
        probability: Share of the tokens to predict.
        pad_to_multiple_of: Rounds t up.
        seed: Another seed, another choice.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        probability: float,
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
    ) -> None:
        self._pad = DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=pad_to_multiple_of)
        self._special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
        self._mask_id = int(tokenizer.mask_token_id)
        self._vocabulary = len(tokenizer)
        self._probability = probability
        self._seed = seed

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Returns model inputs (b, t) and `labels` (b, t), `IGNORED` where nothing is to be predicted."""
        return dict(self._pad([self._masked(sample) for sample in _without_length(samples)]))

    def _masked(self, sample: Sample) -> Sample:
        ids = torch.tensor(sample["input_ids"])
        generator = torch.Generator().manual_seed(crc32(ids.numpy().tobytes(), self._seed & 0xFFFFFFFF))
        draw = torch.rand(len(ids), generator=generator)
        draw[torch.isin(ids, self._special)] = torch.inf
        chosen = draw < self._probability
        if not chosen.any() and draw.isfinite().any():
            chosen[draw.argmin()] = True
        action = torch.rand(len(ids), generator=generator)
        noise = torch.randint(self._vocabulary, (len(ids),), generator=generator)
        shown = torch.where(chosen & (action < 0.8), self._mask_id, ids)
        shown = torch.where(chosen & (action >= 0.8) & (action < 0.9), noise, shown)
        labels = torch.where(chosen, ids, IGNORED)
        return {**sample, "input_ids": shown.tolist(), "labels": labels.tolist()}


def _without_length(samples: list[Sample]) -> list[Sample]:
    return [{name: value for name, value in sample.items() if name != "length"} for sample in samples]
