"""Raw splits, and the checks that every labelled text must pass before any long work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_warn

from lowrank_pl.contract import TargetSpec
from lowrank_pl.errors.data import EmptyDataError
from lowrank_pl.errors.data_files import MissingValueError, NotATextError
from lowrank_pl.errors.labels import MissingLabelsError, NotANumberError, SingleClassError, UnknownLabelError

EmptyTexts = Literal["error", "skip"]

SPLITS = ("train", "validation", "test")


@dataclass
class RawData:
    """What a data set holds before tokenisation.

    Attributes:
        splits: `train`, `validation` and maybe `test`. Rows have `text` and maybe `text_pair`, and `labels` as
            ids, scores or one id per word, except in an unlabelled test split.
        target: What the labels mean; `None` if there are none.
    """

    splits: dict[str, Dataset]
    target: TargetSpec | None


@dataclass
class LabelledText:
    """One split as read from a file: parallel lists, and where each row came from.

    Attributes:
        path: The file, or the hub id.
        rows: Line or row numbers, counted from 1.
        text: First sentences, as they stand in the file: strings, once `with_texts` has looked at them.
        text_pair: Second sentences, or `None` for tasks with one.
        labels: Labels as written in the file, or `None` if it has none.
    """

    path: str | Path
    rows: Sequence[int]
    text: Sequence[object]
    text_pair: Sequence[object] | None = None
    labels: list[object] | None = field(default=None)

    def to_dataset(self, labels: Sequence[int] | Sequence[float] | None) -> Dataset:
        """Returns the rows as a data set.

        Args:
            labels: Ids or scores to write to `labels`, or `None` for an unlabelled split.
        """
        if not self.text:
            raise EmptyDataError(self.path)
        columns: dict[str, object] = {"text": list(self.text)}
        if self.text_pair is not None:
            columns["text_pair"] = list(self.text_pair)
        if labels is not None:
            columns["labels"] = list(labels)
        return Dataset.from_dict(columns)


def with_texts(part: LabelledText, columns: Sequence[str], empty_texts: EmptyTexts) -> LabelledText:
    """Raises an error for rows without text, or leaves them out and says how many.

    A text is empty if it is missing (a null, or the NaN that tables use for it) or white space. What merely looks like
    a null, such as `NA`, is a text. Of a pair both have to be there.

    Args:
        part: A split as it was read.
        columns: Names of the columns of `text` and, if there is one, `text_pair`.
        empty_texts: What to do with such rows.

    Raises:
        MissingValueError: a row without text.
        NotATextError: a value that is neither a string nor a number.
        EmptyDataError: nothing is left.
    """
    empty = set()
    for column, values in zip(columns, filter(None, (part.text, part.text_pair)), strict=True):
        for at, value in enumerate(values):
            if value is not None and not isinstance(value, (str, int, float)):
                raise NotATextError(part.path, part.rows[at], column, value)
            if value is None or value != value or not str(value).strip():
                if empty_texts == "error":
                    raise MissingValueError(part.path, part.rows[at], column, value)
                empty.add(at)
    kept = [at for at in range(len(part.text)) if at not in empty]
    if empty:
        first = part.rows[min(empty)]
        rank_zero_warn(
            f"left out {len(empty)} of {len(part.text)} rows of {str(part.path)!r} without text, first {first}."
        )
    if not kept:
        raise EmptyDataError(part.path)
    pair, labels = part.text_pair, part.labels
    return LabelledText(
        part.path,
        [part.rows[at] for at in kept],
        [str(part.text[at]) for at in kept],
        None if pair is None else [str(pair[at]) for at in kept],
        None if labels is None else [labels[at] for at in kept],
    )


def class_ids(part: LabelledText, ids: dict[str, int], label_names: Sequence[str]) -> list[int]:
    """Turns labels into class ids.

    Args:
        part: A labelled split.
        ids: Id of every spelling of a label.
        label_names: What to tell the user is allowed.

    Raises:
        UnknownLabelError: a label that has no id.
    """
    assert part.labels is not None
    result = []
    for row, value in zip(part.rows, part.labels, strict=True):
        found = ids.get(str(value)) if value is not None else None
        if found is None:
            raise UnknownLabelError(part.path, row, value, label_names)
        result.append(found)
    return result


def scores(part: LabelledText, bounds: tuple[float, float] | None = None) -> list[float]:
    """Turns labels into finite numbers.

    Args:
        part: A labelled split.
        bounds: Smallest and largest score the task knows.

    Raises:
        NotANumberError: a label that is no finite number.
        UnknownLabelError: a number outside the bounds.
    """
    assert part.labels is not None
    result = []
    for row, value in zip(part.rows, part.labels, strict=True):
        try:
            number = float(str(value))
        except ValueError:
            raise NotANumberError(part.path, row, value) from None
        if not math.isfinite(number):
            raise NotANumberError(part.path, row, value)
        if bounds is not None and not bounds[0] <= number <= bounds[1]:
            raise UnknownLabelError(part.path, row, value, f"scores from {bounds[0]:g} to {bounds[1]:g}")
        result.append(number)
    return result


def check_labelled(split: str, part: LabelledText, column: str) -> None:
    """Raises an error for a training or validation split without labels.

    Raises:
        MissingLabelsError: it has none.
    """
    if part.labels is None:
        raise MissingLabelsError(split, part.path, column)


def check_classes(part: LabelledText, ids: Sequence[int], label_names: Sequence[str]) -> None:
    """Raises an error for a training split of one class, which nothing can be learnt from.

    Raises:
        SingleClassError: all ids are equal.
    """
    if len(set(ids)) < 2:
        raise SingleClassError(part.path, label_names[ids[0]] if ids else None, len(ids))
