"""Running text for masked language modelling."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lowrank_pl.contract import TargetSpec
from lowrank_pl.data.base import TextDataModule
from lowrank_pl.data.cache import file_digest
from lowrank_pl.data.collate import Collator, FixedMasking, FreshMasking
from lowrank_pl.data.files import read_lines
from lowrank_pl.data.raw import RawData
from lowrank_pl.data.tokenise import Truncation
from lowrank_pl.errors.data import ArgumentRangeError, EmptyDataError


class TextCorpus(TextDataModule):
    """Plain text, packed into blocks of `max_length` tokens, some of which are masked and to be predicted.

    Training masks anew every time. Evaluation and calibration mask each block the same way whenever it is seen.

    Args:
        tokenizer: Folder, hub id, or `pkg://module/sub/folder` of the encoder whose tokenizer is used. The
            command line sets it from `model.init_args.pretrained`.
        train: Text file of the training split.
        validation: Text file of the validation split.
        test: Text file of the test split.
        mlm_probability: Share of the tokens to predict.
        kwargs: What every datamodule takes, see `TextDataModule`.
    """

    rows_are_samples: ClassVar[bool] = False
    needs_mask_token: ClassVar[bool] = True

    def __init__(
        self,
        tokenizer: str,
        train: str,
        validation: str,
        test: str | None = None,
        mlm_probability: float = 0.15,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        if not 0 < mlm_probability < 1:
            raise ArgumentRangeError("mlm_probability", mlm_probability, "above 0 and below 1")
        self.files: dict[str, str | None] = {"train": train, "validation": validation, "test": test}
        self.mlm_probability = mlm_probability

    @property
    def expected_target(self) -> TargetSpec:
        """What is known before anything is read."""
        return TargetSpec(type(self).__name__, "masked_lm", (), ("perplexity",))

    def source_key(self) -> list[Any]:
        """Identifies the files."""
        return [{split: file_digest(path) for split, path in self.find_files(self.files).items()}]

    def read(self) -> RawData:
        """Reads the files, a row per line that is not blank; see `TextDataModule.read`."""
        splits = {}
        for split, path in self.find_files(self.files).items():
            lines = [line for line in read_lines(path) if line.strip()]
            if not lines:
                raise EmptyDataError(path)
            splits[split] = Dataset.from_dict({"text": lines})
        return RawData(splits, self.expected_target)

    def tokenise(self, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, split: str) -> tuple[Dataset, Truncation]:
        """Joins the tokens of all lines and cuts them into blocks; nothing is lost, so nothing is cut off."""

        def encoded(texts: list[str]) -> dict[str, Any]:
            ids = tokenizer(texts, add_special_tokens=False, padding=False, verbose=False)["input_ids"]
            return {"input_ids": ids}

        lines = dataset.map(
            encoded,
            batched=True,
            input_columns="text",
            remove_columns=dataset.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=f"lowrank_pl-{split}",
            desc=f"Tokenising {split}",
        )
        flat = lines.with_format("arrow")[:]["input_ids"].combine_chunks().flatten()
        blocks = pack(torch.tensor(flat.to_numpy()), *_frame(tokenizer), self.max_length)
        lengths = [len(block) for block in blocks]
        columns: dict[str, Any] = {"input_ids": [block.numpy() for block in blocks]}
        fill = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
        for name in tokenizer.model_input_names:
            if name in fill:
                columns[name] = [fill[name](block).numpy() for block in blocks]
        done = Dataset.from_dict({**columns, "length": lengths})
        return done, Truncation(len(blocks), 0, max(lengths))

    def train_collator(self) -> Collator:
        """Masks anew every time."""
        return FreshMasking(self.load_tokenizer(), self.mlm_probability, self.pad_to_multiple_of)

    def eval_collator(self, seed: int | None = None) -> Collator:
        """Masks by content and seed."""
        seed = self.seed if seed is None else seed
        return FixedMasking(self.load_tokenizer(), self.mlm_probability, self.pad_to_multiple_of, seed)

    def collation_key(self, seed: int) -> list[Any]:
        """Identifies what the masks depend on besides the blocks."""
        return [self.pad_to_multiple_of, self.mlm_probability, seed]


def pack(ids: torch.Tensor, prefix: torch.Tensor, suffix: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Cuts running tokens into blocks with special tokens around each.

    Args:
        ids: Tokens (n,).
        prefix: Special tokens before each block.
        suffix: Special tokens after each block.
        length: Tokens per block, special tokens included.

    Returns:
        Blocks (length,), the last of which may be shorter.
    """
    return [torch.cat([prefix, part, suffix]) for part in ids.split(length - len(prefix) - len(suffix))]


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Special tokens that the tokenizer puts before and after a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    special = encoded["special_tokens_mask"]
    ids = torch.tensor(encoded["input_ids"])
    first = special.index(0) if 0 in special else len(special)
    last = len(special) - special[::-1].index(0) if 0 in special else len(special)
    return ids[:first], ids[last:]
