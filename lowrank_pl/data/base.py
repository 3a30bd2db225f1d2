"""What all datamodules share: tokenised once, cached by content, loaded by any number of processes."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from lowrank_pl.contract import CalibrationBatches, TargetSpec
from lowrank_pl.data.cache import cache_root, digest, tokenizer_digest
from lowrank_pl.data.calibration import SortedBatches, choose
from lowrank_pl.data.collate import Collator, PadCollator
from lowrank_pl.data.prepared import Prepared, tell_truncation
from lowrank_pl.data.raw import RawData
from lowrank_pl.data.resuming import ResumableData
from lowrank_pl.data.sampler import EvaluationSampler, LengthGroupedSampler, grouped_by_length
from lowrank_pl.data.tokenise import (
    Rows,
    Truncation,
    check_length,
    check_tokenizer,
    encode_texts,
    tokenise,
)
from lowrank_pl.errors.data import ArgumentRangeError, DataNotReadyError, TooFewSamplesError
from lowrank_pl.hub import load_config, load_tokenizer

_FORMAT = 1
"""Goes up when the same input would be prepared differently, so that older caches are left alone."""


class TextDataModule(ResumableData, ABC):
    """Texts and labels, tokenised for an encoder.

    Args:
        tokenizer: Folder, hub id, or `pkg://module/sub/folder` of the encoder whose tokenizer is used. The
            command line sets it from `model.init_args.pretrained`.
        max_length: Tokens per sample, special tokens included; longer texts are cut, and it is reported how many.
        batch_size: Training samples per batch and process.
        eval_batch_size: Samples per batch and process in validation, testing and prediction.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        length_grouping: Put texts of similar length in a training batch: less padding, the same expectation.
        pad_to_multiple_of: Round the length of a batch up to a multiple, e.g. 8 for tensor cores.
        max_train_samples: Train on a random subset of this size, chosen by `seed`.
        seed: Decides subsets, splits, the order of training samples and the masks of evaluation.
        cache_dir: Where prepared data are kept; else `$LOWRANK_PL_CACHE/data`, else `~/.cache/lowrank_pl/data`.
    """

    rows_are_samples: ClassVar[bool] = True
    """Whether `max_train_samples` can choose among raw rows, to tokenise no more than needed."""
    needs_mask_token: ClassVar[bool] = False

    def __init__(
        self,
        tokenizer: str,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        length_grouping: bool = True,
        pad_to_multiple_of: int | None = None,
        max_train_samples: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        at_least_one: dict[str, int | None] = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        at_least_one |= {"max_train_samples": max_train_samples, "pad_to_multiple_of": pad_to_multiple_of}
        for argument, value in at_least_one.items():
            if value is not None and value < 1:
                raise ArgumentRangeError(argument, value, "1 or more")
        for argument, value in {"num_workers": num_workers, "seed": seed}.items():
            if value < 0:
                raise ArgumentRangeError(argument, value, "0 or more")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.length_grouping = length_grouping
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_train_samples = max_train_samples
        self.seed = seed
        self.cache_dir = cache_dir
        self._loaded_tokenizer: PreTrainedTokenizerBase | None = None
        self._prepared: Prepared | None = None

    # What a subclass says.

    @abstractmethod
    def source_key(self) -> list[Any]:
        """Identifies the raw content and every argument that `read` and `encode` depend on, in primitives."""

    @abstractmethod
    def read(self) -> RawData:
        """Reads the raw splits and refuses bad ones."""

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: Rows, truncate: bool) -> Rows:
        """Encodes raw rows; see `encode_texts`."""
        return encode_texts(tokenizer, rows, self.max_length, truncate)

    def tokenise(self, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, split: str) -> tuple[Dataset, Truncation]:
        """Turns a raw split into tokenised samples with `length`, and counts what was cut off."""
        return tokenise(dataset, lambda rows, truncate: self.encode(tokenizer, rows, truncate), self.max_length, split)

    def train_collator(self) -> Collator:
        """Makes training batches."""
        return self.eval_collator()

    def eval_collator(self, seed: int | None = None) -> Collator:  # noqa: ARG002
        """Makes batches for evaluation and calibration, the same for the same samples.

        Args:
            seed: Replaces the datamodule's seed where a batch depends on one.
        """
        return PadCollator(self.load_tokenizer(), self.target.kind, self.pad_to_multiple_of)

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Reads, checks, tokenises and caches the data, unless that has been done before; one process."""
        folder = self._folder()
        if not Prepared.exists(folder):
            self._prepare(folder)
        tell_truncation(type(self).__name__, self.max_length, Prepared.read(folder).truncation)

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Loads the prepared data: all splits in every stage, because calibration needs the training split."""
        if self._prepared is None:
            folder = self._folder()
            if not Prepared.exists(folder):
                self._prepare(folder)
            self._prepared = Prepared.read(folder)

    def train_dataloader(self) -> DataLoader[Any]:
        """The training split, in an order that the seed and the epoch decide."""
        dataset = self.split("train")
        rank, world_size = self._place()
        sampler = LengthGroupedSampler(
            len(dataset),
            self.batch_size,
            self._ready().lengths["train"] if self.length_grouping else None,
            num_replicas=world_size,
            rank=rank,
            seed=self.seed,
        )
        with warnings.catch_warnings():
            # About a call inside torchdata, which no user can change.
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            loader = self._loader(dataset, self.batch_size, self.train_collator(), sampler, StatefulDataLoader)
        return self.resumable(loader)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation split, in batches of similar length."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test split if it is labelled, else the validation split: the test files of GLUE carry no labels."""
        return self._eval_loader("test" if self.has_labelled_test else "validation")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test split, labelled or not, else the validation split, in the order of the file."""
        split = "test" if "test" in self._ready().splits else "validation"
        dataset = self.split(split)
        return self._loader(dataset, self.eval_batch_size, self.eval_collator(), self._shares(split))

    # What tasks, strategies and reports ask.

    @property
    def target(self) -> TargetSpec:
        """What the labels mean. Known once `setup` has run."""
        return self._ready().target

    @property
    def has_labelled_test(self) -> bool:
        """Whether there is a test split with labels. Masked language models label every split themselves."""
        splits = self._ready().splits
        return "test" in splits and ("labels" in splits["test"].column_names or self.target.kind == "masked_lm")

    @property
    def fingerprint(self) -> str:
        """Identifies the tokenised samples of all splits."""
        return digest(self._ready().content)

    def describe(self) -> dict[str, Any]:
        """What a report tells: the fingerprint, and how many samples each split has."""
        return {
            "fingerprint": self.fingerprint,
            "samples": {name: dataset.num_rows for name, dataset in self._ready().splits.items()},
        }

    @property
    def truncation(self) -> dict[str, Truncation]:
        """What was cut off, by split."""
        return self._ready().truncation

    def split(self, name: str) -> Dataset:
        """Returns a tokenised split: `train`, `validation` or, if there is one, `test`."""
        return self._ready().splits[name]

    def calibration_batches(
        self,
        batch_size: int,
        max_samples: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> CalibrationBatches:
        """Returns batches of the training split, collated as in evaluation.

        Args:
            batch_size: Samples per batch and process.
            max_samples: Samples over all processes, chosen at random; `None` takes all.
            seed: Decides the choice, and the masks of a masked language model.
            rank: This process.
            world_size: Processes, each of which gets its own share.
        """
        if batch_size < 1:
            raise ArgumentRangeError("batch_size", batch_size, "1 or more", "calibration.batch_size")
        if max_samples is not None and max_samples < 1:
            allowed = "1 or more, or null for all"
            raise ArgumentRangeError("max_samples", max_samples, allowed, "calibration.max_samples")
        dataset = self.split("train")
        chosen = choose(len(dataset), max_samples, seed)
        return SortedBatches(
            dataset,
            chosen,
            self._ready().lengths["train"],
            batch_size,
            self.eval_collator(seed),
            digest(self._ready().content["train"], chosen, batch_size, self.collation_key(seed)),
            rank,
            world_size,
        )

    def collation_key(self, seed: int) -> list[Any]:  # noqa: ARG002
        """Identifies, in primitives, what `eval_collator(seed)` depends on besides the samples."""
        return [self.pad_to_multiple_of]

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer, loaded once and checked.

        Raises:
            MissingTokenError: it lacks a special token that batches need.
            MaxLengthError: the model takes no input of `max_length` tokens.
        """
        if self._loaded_tokenizer is None:
            tokenizer = load_tokenizer(self.tokenizer)
            check_tokenizer(tokenizer, self.tokenizer, self.needs_mask_token)
            check_length(self.max_length, tokenizer, load_config(self.tokenizer))
            self._loaded_tokenizer = tokenizer
        return self._loaded_tokenizer

    # The work.

    def _ready(self) -> Prepared:
        if self._prepared is None:
            raise DataNotReadyError(f"the content of {type(self).__name__}")
        return self._prepared

    def _folder(self) -> Path:
        subset = None if self.max_train_samples is None else [self.max_train_samples, self.seed]
        key = digest(
            _FORMAT,
            type(self).__name__,
            self.source_key(),
            tokenizer_digest(self.load_tokenizer()),
            self.max_length,
            subset,
        )
        return cache_root(self.cache_dir) / f"{type(self).__name__.lower()}-{key}"

    def _prepare(self, folder: Path) -> None:
        tokenizer = self.load_tokenizer()
        raw = self.read()
        splits, truncation = {}, {}
        for split, rows in raw.splits.items():
            choose_rows = split == "train" and self.rows_are_samples
            tokenised, cut = self.tokenise(tokenizer, self._subset(rows) if choose_rows else rows, split)
            splits[split] = self._subset(tokenised) if split == "train" and not choose_rows else tokenised
            truncation[split] = replace(cut, samples=len(splits[split]))
        Prepared.write(folder, splits, raw.target, truncation)

    def _subset(self, dataset: Dataset) -> Dataset:
        chosen = choose(len(dataset), self.max_train_samples, self.seed)
        return dataset if len(chosen) == len(dataset) else dataset.select(chosen)

    def _eval_loader(self, split: str) -> DataLoader[Any]:
        # Batches of similar length in random order: sorting all would make the first batches, which
        # limit_val_batches keeps, the shortest texts. The order is fixed by the seed.
        shares = self._shares(split)
        generator = torch.Generator().manual_seed(self.seed)
        together = self.eval_batch_size * shares.num_replicas
        order = grouped_by_length(self._ready().lengths[split], together, generator, window=None)
        return self._loader(self.split(split).select(order), self.eval_batch_size, self.eval_collator(), shares)

    def _shares(self, split: str) -> EvaluationSampler:
        rank, world_size = self._place()
        size = len(self.split(split))
        # A process without a batch would leave the others waiting for its part of the score.
        if size < world_size:
            name = f"{split} split of {self.target.name}"
            raise TooFewSamplesError(name, size, world_size, "for every process to have one", "Lower trainer.devices.")
        return EvaluationSampler(size, world_size, rank)

    def _place(self) -> tuple[int, int]:
        """Returns this process and how many there are."""
        where = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        return where.get("rank", 0), where.get("num_replicas", 1)

    def _loader(
        self,
        dataset: Dataset,
        batch_size: int,
        collate: Collator,
        sampler: Sampler[int],
        kind: type[DataLoader[Any]] = DataLoader,
    ) -> DataLoader[Any]:
        return kind(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            # A loader without one draws a seed from the global random state, and a run that skips an evaluation, as one
            # does that is resumed after it, would go on with other dropout masks.
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
