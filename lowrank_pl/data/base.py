"""What all datamodules share: tokenised once, cached by content, loaded by any number of processes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, get_args

from datasets import Dataset
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lowrank_pl.contract import CalibrationBatches, TargetSpec, choose
from lowrank_pl.data.cache import cache_root, digest, tokenizer_digest
from lowrank_pl.data.calibration import SortedBatches
from lowrank_pl.data.collate import Collator, PadCollator
from lowrank_pl.data.loaders import BatchLoaders
from lowrank_pl.data.needed_files import Files, find_needed
from lowrank_pl.data.prepared import Prepared, tell_missing_classes, tell_truncation
from lowrank_pl.data.raw import RawData
from lowrank_pl.data.tokenise import (
    Rows,
    Truncation,
    check_length,
    check_tokenizer,
    encode_texts,
    tokenise,
)
from lowrank_pl.errors import LowRankError
from lowrank_pl.errors.data import ArgumentRangeError, DataNotReadyError
from lowrank_pl.errors.data_files import MissingFileError, MissingSplitError
from lowrank_pl.errors.labels import UnknownTargetError
from lowrank_pl.hub import load_config, load_tokenizer

_FORMAT = 3
"""Goes up when the same input would be prepared differently, so that older caches are left alone."""


def check_choice(argument: str, value: str, choices: Any) -> None:
    """Raises an error for an argument that is none of a `Literal`'s words: in Python nothing else does.

    Raises:
        ArgumentRangeError: naming the words.
    """
    words = get_args(choices)
    if value not in words:
        raise ArgumentRangeError(argument, value, ", ".join(map(repr, words)))


_ENDLESS = ("rope_parameters", "rope_theta", "rope_scaling", "alibi")
"""Fields of configurations whose positions are computed, not looked up."""


class TextDataModule(BatchLoaders):
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
    needs_pad_token: ClassVar[bool] = True
    length_argument: ClassVar[str] = "max_length"
    """The argument that sets `max_length`, for errors."""

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
        super().__init__(batch_size, eval_batch_size, num_workers, length_grouping, seed)
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
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_train_samples = max_train_samples
        self.cache_dir = cache_dir
        self._loaded_tokenizer: PreTrainedTokenizerBase | None = None
        self._prepared: Prepared | None = None
        self.serves: TrainerFn | None = None  # what for, where there is no trainer to tell
        self._left_out: dict[str, MissingFileError] = {}

    # What a subclass says.

    @abstractmethod
    def source_key(self) -> list[Any]:
        """Identifies the raw content and every argument that `read` and `encode` depend on, in primitives."""

    @abstractmethod
    def read(self) -> RawData:
        """Reads the raw splits and raises an error for bad ones."""

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
        kind = self.target.kind if self.knows_target else "classification"
        return PadCollator(self.load_tokenizer(), kind, self.pad_to_multiple_of)

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Reads, checks, tokenises and caches the data, unless that has been done before; one process.

        What is wrong with them is found again in `setup`. Of several processes each then ends with the same message;
        one that ended here would leave the others at a barrier, and their traceback is all that a user sees.
        """
        try:
            self.prepare()
        except LowRankError:
            if self._place()[1] == 1:
                raise

    def prepare(self) -> None:
        """Does the work of `prepare_data`."""
        prepared = self.prepared(self.source_key(), self.read)
        tell_truncation(type(self).__name__, self.max_length, prepared.truncation)
        if self.verb in (None, TrainerFn.FITTING):
            tell_missing_classes(type(self).__name__, prepared)
        for split, error in self._left_out.items():
            rank_zero_info(f"{type(self).__name__}: goes on without the {split} split: {error}")

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Loads the prepared data: all splits in every stage, because calibration needs the training split."""
        if self._prepared is None or self._left_out:
            self._prepared = self.prepared(self.source_key(), self.read)

    # What tasks, strategies and reports ask.

    @property
    def expected_target(self) -> TargetSpec | None:
        """What is known of `target` before anything is read; here nothing."""
        return None

    @property
    def target(self) -> TargetSpec:
        """What the labels mean. Known once `setup` has run.

        Raises:
            UnknownTargetError: there are no labels, and no model has told.
        """
        if (target := self._target_found()) is None:
            self._ready()
            raise UnknownTargetError(type(self).__name__)
        return target

    @property
    def knows_target(self) -> bool:
        """Whether there is a `target`: not before `setup`, and not for texts alone, as long as no model has told."""
        return self._target_found() is not None

    def _target_found(self) -> TargetSpec | None:
        return None if self._prepared is None else self._prepared.target

    @property
    def data_name(self) -> str:
        """Of the task, where it is known; else of the class."""
        return self.target.name if self.knows_target else type(self).__name__

    def lengths(self, split: str) -> list[int]:
        """Tokens of each sample of a split."""
        return self._ready().lengths[split]

    def content(self, split: str) -> str:
        """Identifies the rows of a split."""
        return self._ready().content[split]

    @property
    def has_labelled_test(self) -> bool:
        """Whether there is a test split with labels. Masked language models label every split themselves."""
        splits = self._ready().splits
        masked = self.knows_target and self.target.kind == "masked_lm"
        return "test" in splits and ("labels" in splits["test"].column_names or masked)

    @property
    def place_of_labels(self) -> str:
        """Where a labelled split has them, to go on a sentence; empty where there is no choice."""
        return ""

    @property
    def fingerprint(self) -> str:
        """Identifies the tokenised samples of all splits."""
        return digest(self._ready().content)

    def describe(self) -> dict[str, Any]:
        """For reports: the fingerprint, how many samples each split has and, of `test`, which of them it has scored."""
        told = {
            "fingerprint": self.fingerprint,
            "samples": {name: dataset.num_rows for name, dataset in self._ready().splits.items()},
        }
        return {**told, "scored": self.split_to_test()} if self.verb == TrainerFn.TESTING else told

    @property
    def truncation(self) -> dict[str, Truncation]:
        """What was cut off, by split."""
        return self._ready().truncation

    def split(self, name: str) -> Dataset:
        """Returns a tokenised split: `train`, `validation` or, if there is one, `test`.

        Raises:
            MissingSplitError: the data do not have it.
            MissingFileError: its file is not there.
        """
        splits = self._ready().splits
        if name in self._left_out:
            raise self._left_out[name]
        if name not in splits:
            unlabelled = name == "validation" and "test" in splits and not self.has_labelled_test
            told = f"To be scored, the test split needs labels{self.place_of_labels}." if unlabelled else ""
            raise MissingSplitError(name, list(splits), told or f"Give data.init_args.{name}.")
        return splits[name]

    def predicted_rows(self) -> Sequence[Mapping[str, Any]] | None:
        """The raw rows of the split that `predict` runs on, in its order; `None` if a sample is not one row."""
        return self._ready().texts.get(self.split_to_predict())

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
        collation = [tokenizer_digest(self.load_tokenizer()), self.collation_key(seed)]  # it pads, and may mask
        return SortedBatches(
            dataset,
            chosen,
            self._ready().lengths["train"],
            batch_size,
            self.eval_collator(seed),
            digest(self._ready().content["train"], chosen, batch_size, collation),
            rank,
            world_size,
        )

    def collation_key(self, seed: int) -> list[Any]:  # noqa: ARG002
        """Identifies, in primitives, what `eval_collator(seed)` depends on besides samples and tokenizer."""
        return [self.pad_to_multiple_of]

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer, loaded once and checked.

        Raises:
            MissingTokenError: it lacks a special token that batches need.
            MaxLengthError: the model takes no input of `max_length` tokens, padded to `pad_to_multiple_of`.
        """
        if self._loaded_tokenizer is None:
            tokenizer = load_tokenizer(self.tokenizer)
            check_tokenizer(tokenizer, self.tokenizer, self.needs_mask_token, self.needs_pad_token)
            check_length(
                self.max_length, tokenizer, load_config(self.tokenizer), self.length_argument, self.pad_to_multiple_of
            )
            self._loaded_tokenizer = tokenizer
        return self._loaded_tokenizer

    def check_positions(self, config: Any, source: str | None) -> None:
        """Raises `MaxLengthError` where a model of this configuration takes no input of `max_length` tokens.

        Args:
            config: Of the model.
            source: Where it is from. Positions that are computed go on for ever: rotary and ALiBi models from elsewhere
                than the tokenizer take what that allows.
        """
        if source != self.tokenizer and any(getattr(config, name, None) for name in _ENDLESS):
            return
        check_length(self.max_length, None, config, self.length_argument, self.pad_to_multiple_of)

    # Which splits a run needs.

    @property
    def verb(self) -> TrainerFn | None:
        """What these data are read for: the trainer's verb, or what was said where there is no trainer."""
        return self.serves if self.trainer is None else self.trainer.state.fn

    def find_files(self, files: Files, argument: str = "data.init_args.{split}") -> dict[str, Path]:
        """Returns the files of the splits that were given and are there; see `find_needed`.

        A run that does not train does without those that it need not read: what asks for such a split all the same, as
        calibration may, gets the error about the file.

        Raises:
            MissingFileError: a file that the run reads is not there.
        """
        found, self._left_out = find_needed(files, self.verb, argument)
        return found

    # The work.

    def _ready(self) -> Prepared:
        if self._prepared is None:
            raise DataNotReadyError(f"the content of {type(self).__name__}")
        return self._prepared

    def prepared(self, source: list[Any], read: Callable[[], RawData]) -> Prepared:
        """Finds prepared data by what identifies their source, or reads and tokenises them."""
        subset = None if self.max_train_samples is None else [self.max_train_samples, self.seed]
        tokenizer = tokenizer_digest(self.load_tokenizer())
        key = digest(_FORMAT, type(self).__name__, source, tokenizer, self.max_length, subset)
        folder = cache_root(self.cache_dir) / f"{type(self).__name__.lower()}-{key}"
        if not Prepared.exists(folder):
            self._prepare(folder, read())
        return Prepared.read(folder)

    def _prepare(self, folder: Path, raw: RawData) -> None:
        tokenizer = self.load_tokenizer()
        splits, truncation = {}, {}
        for split, rows in raw.splits.items():
            choose_rows = split == "train" and self.rows_are_samples
            tokenised, cut = self.tokenise(tokenizer, self._subset(rows) if choose_rows else rows, split)
            splits[split] = self._subset(tokenised) if split == "train" and not choose_rows else tokenised
            truncation[split] = replace(cut, samples=len(splits[split]))
        texts = {
            split: rows.remove_columns([name for name in rows.column_names if name == "labels"])
            for split, rows in raw.splits.items()
            if split != "train" and self.rows_are_samples
        }
        Prepared.write(folder, splits, raw.target, truncation, texts)

    def _subset(self, dataset: Dataset) -> Dataset:
        chosen = choose(len(dataset), self.max_train_samples, self.seed)
        return dataset if len(chosen) == len(dataset) else dataset.select(chosen)

    def split_to_predict(self) -> str:
        """The test split, labelled or not, else the validation split."""
        return "test" if "test" in self._ready().splits else "validation"
