"""Tagged words in columns, as in the CoNLL shared tasks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_warn
from transformers import BatchEncoding, PreTrainedTokenizerBase

from lowrank_pl.contract import TargetSpec
from lowrank_pl.data.base import TextDataModule
from lowrank_pl.data.cache import file_digest
from lowrank_pl.data.collate import IGNORED
from lowrank_pl.data.files import read_lines
from lowrank_pl.data.raw import RawData
from lowrank_pl.data.tokenise import Rows
from lowrank_pl.errors.data import EmptyDataError
from lowrank_pl.errors.data_files import MalformedLineError
from lowrank_pl.errors.labels import BadTagError, SingleClassError, UnknownLabelError

# Not every Unicode space separates: some corpora have a no-break space as a token.
_SEPARATOR = re.compile(r"[ \t]+")
_TAG = re.compile(r"O|[BI]-\S+")
_DOCUMENT = "-DOCSTART-"


@dataclass
class Sentence:
    """Words of a sentence, their tags, and the lines they stand on."""

    words: list[str]
    tags: list[str]
    lines: list[int]


def read_conll(path: Path, token_column: int = 0, tag_column: int = -1) -> list[Sentence]:
    """Reads sentences from a column file: one word per line, an empty line between sentences.

    Args:
        path: The file; spaces or tabs separate columns.
        token_column: Column of the word, counted from 0, or from the end if negative.
        tag_column: Column of its tag, likewise.

    Raises:
        EncodingError: the file is not UTF-8.
        MalformedLineError: a line has too few columns.
        BadTagError: a tag is not of the BIO scheme.
        EmptyDataError: there are no sentences.
    """
    least = max(2, *(column + 1 if column >= 0 else -column for column in (token_column, tag_column)))
    sentences = [Sentence([], [], [])]
    for number, line in enumerate(read_lines(path), 1):
        fields = _SEPARATOR.split(line.strip(" \t"))
        if fields == [""] or fields[0] == _DOCUMENT:
            sentences.append(Sentence([], [], []))
            continue
        if len(fields) < least:
            raise MalformedLineError(
                path,
                number,
                f"{len(fields)} column(s): {line!r}",
                f"at least {least}, for token_column={token_column} and tag_column={tag_column}",
                "Correct the line, or check data.init_args.token_column and tag_column.",
            )
        word, tag = fields[token_column], fields[tag_column]
        if not _TAG.fullmatch(tag):
            raise BadTagError(path, number, tag)
        sentences[-1].words.append(word)
        sentences[-1].tags.append(tag)
        sentences[-1].lines.append(number)
    sentences = [sentence for sentence in sentences if sentence.words]
    if not sentences:
        raise EmptyDataError(path)
    return sentences


def to_bio(tags: list[str]) -> list[str]:
    """Begins every entity with `B-`: the identity on BIO, and what turns IOB1 into BIO.

    IOB1 begins an entity with `I-` unless it touches another of the same type.
    """
    result = []
    previous = "O"
    for tag in tags:
        begins = tag.startswith("I-") and previous[2:] != tag[2:]
        result.append(f"B-{tag[2:]}" if begins else tag)
        previous = tag
    return result


class CoNLL(TextDataModule):
    """Named entities, or any other spans, in column files with BIO or IOB1 tags.

    The first piece of a word carries its tag; other pieces and special tokens carry none.

    Args:
        tokenizer: Folder, hub id, or `pkg://module/sub/folder` of the encoder whose tokenizer is used. The
            command line sets it from `model.init_args.pretrained`.
        train: File of the training split.
        validation: File of the validation split.
        test: File of the test split.
        token_column: Column of the word, counted from 0, or from the end if negative.
        tag_column: Column of its tag, likewise.
        kwargs: What every datamodule takes, see `TextDataModule`.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str,
        validation: str,
        test: str | None = None,
        token_column: int = 0,
        tag_column: int = -1,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        self.files: dict[str, str | None] = {"train": train, "validation": validation, "test": test}
        self.token_column = token_column
        self.tag_column = tag_column

    @property
    def expected_target(self) -> TargetSpec:
        """What is known before anything is read."""
        return TargetSpec(type(self).__name__, "token_classification", (), ("entity_f1",))

    def source_key(self) -> list[Any]:
        """Identifies the files and how they are read."""
        files = {split: file_digest(path) for split, path in self._paths().items()}
        return [files, self.token_column, self.tag_column]

    def read(self) -> RawData:
        """Reads the files; see `TextDataModule.read`."""
        paths = self._paths()
        parts = {split: self._sentences(path) for split, path in paths.items()}
        types = sorted({tag[2:] for sentence in parts["train"] for tag in sentence.tags if tag != "O"})
        if not types:
            words = sum(len(sentence.words) for sentence in parts["train"])
            raise SingleClassError(paths["train"], "O", words)
        names = ("O", *(f"{begin}-{type_}" for type_ in types for begin in "BI"))
        ids = {name: id_ for id_, name in enumerate(names)}
        splits = {}
        for split, sentences in parts.items():
            for sentence in sentences:
                for line, tag in zip(sentence.lines, sentence.tags, strict=True):
                    if tag not in ids:
                        raise UnknownLabelError(paths[split], line, tag, names)
            splits[split] = Dataset.from_dict(
                {
                    "words": [sentence.words for sentence in sentences],
                    "labels": [[ids[tag] for tag in sentence.tags] for sentence in sentences],
                }
            )
        return RawData(splits, TargetSpec(type(self).__name__, "token_classification", names, ("entity_f1",)))

    def _paths(self) -> dict[str, Path]:
        paths = self.find_files(self.files)
        if "train" not in paths:
            raise self._left_out["train"]  # it tells the tags
        return paths

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer, loaded once and checked; see `TextDataModule.load_tokenizer`."""
        tokenizer = super().load_tokenizer()
        # Byte-level tokenizers know the words inside a sentence with a leading space only.
        pre_tokenizer: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
        if getattr(pre_tokenizer, "add_prefix_space", None) is False:
            pre_tokenizer.add_prefix_space = True
        return tokenizer

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: Rows, truncate: bool) -> Rows:
        """Encodes words and hands each tag to the first piece of its word."""
        encoded = self._pieces(tokenizer, self._with_pieces(tokenizer, rows["words"]), truncate)
        labels = [aligned(encoded.word_ids(at), tags) for at, tags in enumerate(rows["labels"])]
        return {**encoded, "labels": labels}

    def _pieces(self, tokenizer: PreTrainedTokenizerBase, sentences: list[list[str]], truncate: bool) -> BatchEncoding:
        encoded: BatchEncoding = tokenizer(
            sentences,
            is_split_into_words=True,
            truncation=truncate,
            max_length=self.max_length if truncate else None,
            padding=False,
            verbose=False,
        )
        return encoded

    def _with_pieces(self, tokenizer: PreTrainedTokenizerBase, sentences: list[list[str]]) -> list[list[str]]:
        """The sentences with the unknown token in the place of words that a tokenizer leaves nothing of.

        Such are zero-width spaces and variation selectors to BERT's. Without a piece they would have no tag, and the
        tags predicted for the words behind them would be taken for those of others.
        """
        encoded, unknown = self._pieces(tokenizer, sentences, truncate=False), str(tokenizer.unk_token)
        seen = [set(encoded.word_ids(at)) for at in range(len(sentences))]
        return [
            [word if place in known else unknown for place, word in enumerate(words)]
            for words, known in zip(sentences, seen, strict=True)
        ]

    def _sentences(self, path: Path) -> list[Sentence]:
        sentences = read_conll(path, self.token_column, self.tag_column)
        converted = 0
        for sentence in sentences:
            tags = to_bio(sentence.tags)
            converted += sum(old != new for old, new in zip(sentence.tags, tags, strict=True))
            sentence.tags = tags
        if converted:
            rank_zero_warn(
                f"CoNLL: {converted} entities of {str(path)!r} begin with I-: read as IOB1 and converted to BIO."
            )
        return sentences


def aligned(word_ids: list[int | None], tags: list[int]) -> list[int]:
    """Gives each word's tag to its first piece.

    Args:
        word_ids: Word of every token, `None` for special tokens.
        tags: Tag id of every word.

    Returns:
        A label for every token, `IGNORED` for all but first pieces.
    """
    labels = []
    previous = None
    for word in word_ids:
        labels.append(IGNORED if word is None or word == previous else tags[word])
        previous = word
    return labels
