"""Running text for decoders, in windows of one length."""

from __future__ import annotations

from typing import Any, ClassVar

import datasets
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowrank_pl.contract import TargetSpec
from lowrank_pl.data.base import TextDataModule
from lowrank_pl.data.cache import dataset_digest, file_digest
from lowrank_pl.data.collate import IGNORED, Collator, Sample
from lowrank_pl.data.files import read_utf8
from lowrank_pl.data.formats import read_columns
from lowrank_pl.data.raw import SPLITS, RawData
from lowrank_pl.data.tokenise import LEAST_LENGTH, Truncation
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.data import (
    ArgumentRangeError,
    EmptyDataError,
    MaxLengthError,
    MissingTokenError,
    OfflineError,
    WindowError,
)
from lowrank_pl.errors.data_files import NotATextError, UnknownColumnError


class CausalText(TextDataModule):
    r"""A corpus whose every token is to be predicted from those before it: files, or a data set of the hub.

    The tokens of a split are joined and cut into windows. A `.txt` file is one document, tokenised as a whole; every
    row of a JSON Lines, Parquet, CSV or TSV file, or of a data set of the hub, is a document of its own.

    Evaluation predicts every token of a split but the first of each window, which nothing precedes; the last window may
    be shorter. With a `stride` windows overlap, and each predicts only those of its tokens that the window before it
    does not have: more context, and more windows. Perplexities compare only at the same window and stride.

    Args:
        tokenizer: Folder, hub id, or `pkg://module/sub/folder` of the decoder whose tokenizer is used. The
            command line sets it from `model.init_args.pretrained`.
        train: File of the training split, from which calibration windows are taken too; its extension gives its format.
            `validate` and `test` can do without. With `dataset` the name of a split, such as `train[:1000]`.
        validation: The same for the validation split, which `compress` and `diagnose` score.
        test: The same for the test split.
        dataset: A data set of the hub, by its id, instead of files. Where no split is named, those three that it has.
        subset: Its configuration, where it has several, such as `wikitext-2-raw-v1`.
        column: The column of the text, in everything but `.txt` files.
        separator: Text between two documents, such as `"\n\n"` for data sets whose rows are the lines of one text; by
            default the tokenizer's token for the end of a text.
        window: Tokens per window.
        stride: From the start of a window to that of the next one in evaluation, `1 <= stride <= window`; by default
            windows do not overlap.
        bos: Start every window with the tokenizer's token for the beginning of a text, which some models (Gemma) cannot
            do without; the first token of the text in it is then predicted as well.
        drop_partial: Leave out the last window of the training split where it is not full.
        kwargs: What every datamodule takes, see `TextDataModule`.
    """

    rows_are_samples: ClassVar[bool] = False
    needs_pad_token: ClassVar[bool] = False
    length_argument: ClassVar[str] = "window"

    def __init__(
        self,
        tokenizer: str,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        dataset: str | None = None,
        subset: str | None = None,
        column: str = "text",
        separator: str | None = None,
        window: int = 512,
        stride: int | None = None,
        bos: bool = False,
        drop_partial: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, max_length=window, **kwargs)
        self.files: dict[str, str | None] = {"train": train, "validation": validation, "test": test}
        if dataset is None and not any(self.files.values()):
            raise MissingArgumentError(
                "a corpus", "Give data.init_args.train, .validation or .test (files), or .dataset (of the hub)."
            )
        if window < LEAST_LENGTH:
            raise MaxLengthError(window, LEAST_LENGTH, None, "window")
        room = window - bos
        if stride is not None and not 1 <= stride <= room:
            raise ArgumentRangeError("stride", stride, f"1 to {room}, the tokens of a window")
        self.dataset = dataset
        self.subset = subset
        self.column = column
        self.separator = separator
        self.window = window
        self.stride = stride
        self.bos = bos
        self.drop_partial = drop_partial

    @property
    def expected_target(self) -> TargetSpec:
        """What is known before anything is read."""
        return TargetSpec(type(self).__name__, "causal_lm", (), ("perplexity",))

    def describe(self) -> dict[str, Any]:
        """Adds the window, the stride and how many tokens each split predicts."""
        predicted = {name: _predicted(split) for name, split in self._ready().splits.items()}
        return {**super().describe(), "window": self.window, "stride": self.stride, "predicted_tokens": predicted}

    # Reading.

    def source_key(self) -> list[Any]:
        """Identifies the content, and how it is cut."""
        if self.dataset is None:
            content = {split: file_digest(path) for split, path in self.find_files(self.files).items()}
        else:
            content = {split: dataset_digest(rows) for split, rows in self._from_hub().items()}
        return [content, self.column, self.separator, self.stride, self.bos, self.drop_partial]

    def read(self) -> RawData:
        """Reads the documents, a row each; see `TextDataModule.read`."""
        if self.dataset is None:
            documents = {split: self._of_file(path) for split, path in self.find_files(self.files).items()}
        else:
            documents = {split: self._of_hub(rows) for split, rows in self._from_hub().items()}
        splits = {split: Dataset.from_dict({"text": texts}) for split, texts in documents.items()}
        return RawData(splits, self.expected_target)

    def _of_file(self, path: Any) -> list[str]:
        if path.suffix.lower() == ".txt":
            return _texts(path, range(1, 2), "text", [read_utf8(path).decode("utf-8")])
        found = read_columns(path, {self.column: "data.init_args.column"})
        return _texts(path, found.rows, self.column, found.values[self.column])

    def _of_hub(self, rows: Dataset) -> list[str]:
        where = f"{self.dataset} ({self.subset or 'default'}, {rows.split or 'rows'})"
        if self.column not in rows.column_names:
            raise UnknownColumnError(self.column, rows.column_names, where, "data.init_args.column")
        return _texts(where, range(1, len(rows) + 1), self.column, list(rows[self.column]))

    def _from_hub(self) -> dict[str, Dataset]:
        assert self.dataset is not None
        named = {split: name for split, name in self.files.items() if name is not None}
        try:
            if named:
                return {s: datasets.load_dataset(self.dataset, self.subset, split=name) for s, name in named.items()}
            found = datasets.load_dataset(self.dataset, self.subset)
        # RuntimeError: a data set that is a script, which nothing runs any more.
        except (OSError, TimeoutError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            remedy = (
                "Check data.init_args.dataset, .subset and the names of splits, or give files as .train, .validation "
                "and .test."
            )
            told = str(error.__cause__ or error).splitlines() or [type(error).__name__]
            raise OfflineError(self.dataset, told[0], remedy) from error
        return {split: found[split] for split in SPLITS if split in found}

    # Cutting.

    def tokenise(self, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, split: str) -> tuple[Dataset, Truncation]:
        """Joins the tokens of all documents and cuts them into windows with `labels`; nothing is cut off."""
        prefix = self._prefix(tokenizer)
        ids = self._joined(tokenizer, list(dataset["text"]))
        room = self.window - len(prefix)
        if len(ids) < room:
            raise WindowError(split, len(ids), room)
        stride = room if split == "train" or self.stride is None else self.stride
        windows = cut(ids, prefix, room, stride)
        if split == "train" and self.drop_partial:
            windows = [pair for pair in windows if len(pair[0]) == self.window]
        lengths = [len(shown) for shown, _ in windows]
        columns = {
            "input_ids": [shown.numpy() for shown, _ in windows],
            "labels": [labels.numpy() for _, labels in windows],
            "length": lengths,
        }
        return Dataset.from_dict(columns), Truncation(len(windows), 0, max(lengths))

    def _joined(self, tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Tensor:
        if self.separator is not None:
            documents = [self.separator.join(documents)]
        if len(documents) > 1 and tokenizer.eos_token_id is None:
            raise MissingTokenError(self.tokenizer, "eos")
        encoded = tokenizer(documents, add_special_tokens=False, padding=False, verbose=False)["input_ids"]
        ids = [token for document in encoded for token in (*document, tokenizer.eos_token_id)]
        return torch.tensor(ids[:-1])  # between documents, not after the last

    def _prefix(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        if not self.bos:
            return torch.empty(0, dtype=torch.long)
        if tokenizer.bos_token_id is None:
            raise MissingTokenError(self.tokenizer, "bos")
        return torch.tensor([tokenizer.bos_token_id])

    def eval_collator(self, seed: int | None = None) -> Collator:
        """Makes batches; nothing in them is random."""
        del seed
        tokenizer = self.load_tokenizer()
        fill = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)
        return WindowCollator(fill, self.pad_to_multiple_of)


def cut(ids: Tensor, prefix: Tensor, room: int, stride: int) -> list[tuple[Tensor, Tensor]]:
    """Cuts running tokens into windows, each of which predicts what those before it have not.

    Args:
        ids: Tokens (n,).
        prefix: Tokens to put before each window, at most one.
        room: Tokens of the text in a window.
        stride: From window to window, at most `room`.

    Returns:
        Pairs of tokens and labels, of which the last may be shorter; -100 is the label of a token that is not
        predicted. A window that would predict nothing is left out.
    """
    windows = []
    end = 0
    for start in range(0, len(ids), stride):
        new = end - start  # where in the window the tokens begin that no window has had
        end = min(start + room, len(ids))
        labels = torch.cat([torch.full_like(prefix, IGNORED), ids[start:end]])
        labels[: len(prefix) + new] = IGNORED
        labels[0] = IGNORED
        if bool((labels != IGNORED).any()):
            windows.append((torch.cat([prefix, ids[start:end]]), labels))
        if end == len(ids):
            break
    return windows


class WindowCollator:
    """Makes a batch of windows; b: windows, t: tokens of the longest.

    Shorter windows are padded on the right, where no token before it sees the padding: any token may stand there, and a
    tokenizer without one for it will do. A batch of full windows has no `attention_mask`, which attention is faster
    without.

    Args:
        fill: The token to pad with.
        pad_to_multiple_of: Rounds t up.
    """

    def __init__(self, fill: int, pad_to_multiple_of: int | None = None) -> None:
        self._fill = fill
        self._multiple = pad_to_multiple_of or 1

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Returns `input_ids` (b, t), `labels` (b, t) and, where something is padded, `attention_mask` (b, t)."""
        lengths = [len(sample["input_ids"]) for sample in samples]
        longest = -(-max(lengths) // self._multiple) * self._multiple
        batch = {}
        for name, fill in (("input_ids", self._fill), ("labels", IGNORED)):
            batch[name] = torch.tensor([[*s[name], *[fill] * (longest - len(s[name]))] for s in samples])
        if min(lengths) < longest:
            batch["attention_mask"] = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        return batch


def _predicted(dataset: Dataset) -> int:
    labels = dataset.with_format("arrow")[:]["labels"].combine_chunks().flatten()
    return int((labels.to_numpy() != IGNORED).sum())


def _texts(where: Any, rows: Any, column: str, values: list[Any]) -> list[str]:
    """The documents, without those that are missing; blank ones stay, whose place counts where rows are lines."""
    texts = []
    for row, value in zip(rows, values, strict=True):
        if value is not None and not isinstance(value, (str, int, float)):
            raise NotATextError(where, row, column, value)
        if value is not None and value == value:  # NaN is what tables have where nothing is
            texts.append(str(value))
    if not any(text.strip() for text in texts):
        raise EmptyDataError(where)
    return texts
