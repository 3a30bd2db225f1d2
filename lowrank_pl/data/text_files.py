"""Labelled texts in files of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from lowrank_pl.contract import MetricName, TargetSpec
from lowrank_pl.data.base import TextDataModule
from lowrank_pl.data.cache import file_digest
from lowrank_pl.data.files import find_splits
from lowrank_pl.data.formats import read_columns
from lowrank_pl.data.raw import LabelledText, RawData, check_classes, check_labelled, class_ids, scores
from lowrank_pl.errors.data import ArgumentRangeError, MissingValueError, TooFewSamplesError

_METRICS: dict[str, tuple[MetricName, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
}


class TextFiles(TextDataModule):
    """Texts, or pairs of texts, with a class or a number: CSV, TSV, JSON Lines or Parquet files.

    CSV may be quoted; in TSV a quotation mark is a character like any other. Both start with a header line.

    Args:
        tokenizer: Folder, hub id, or `pkg://module/sub/folder` of the encoder whose tokenizer is used. The
            command line sets it from `model.init_args.pretrained`.
        train: File of the training split; its extension tells its format.
        validation: File of the validation split; without it a part of the training split is set aside.
        test: File of the test split, labelled or not.
        text: Column of the text.
        text_pair: Column of the second text, if there are two.
        label: Column of the label.
        kind: Whether labels are classes or numbers.
        label_names: Class names in the order of their ids; labels may then be names or ids. Without it the
            labels of the training split, sorted, are the names.
        metrics: Metrics whose mean is the score; accuracy for classes, pearson and spearman for numbers if not given.
        validation_fraction: Part of the training file to validate on if there is no validation file, chosen by
            `seed`.
        kwargs: What every datamodule takes, see `TextDataModule`.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str,
        validation: str | None = None,
        test: str | None = None,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "label",
        kind: Literal["classification", "regression"] = "classification",
        label_names: list[str] | None = None,
        metrics: list[MetricName] | None = None,
        validation_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        allowed = _METRICS[kind]
        for metric in metrics or ():
            if metric not in allowed:
                raise ArgumentRangeError("metrics", metric, f"for {kind} any of {', '.join(allowed)}")
        if not 0 < validation_fraction < 1:
            raise ArgumentRangeError("validation_fraction", validation_fraction, "above 0 and below 1")
        if label_names is not None and not 2 <= len(set(label_names)) == len(label_names):
            raise ArgumentRangeError("label_names", label_names, "two or more names, all different")
        self.files: dict[str, str | None] = {"train": train, "validation": validation, "test": test}
        self.text = text
        self.text_pair = text_pair
        self.label = label
        self.kind = kind
        self.label_names = label_names
        self.metrics = tuple(metrics) if metrics else (allowed[:1] if kind == "classification" else allowed)
        self.validation_fraction = validation_fraction

    def source_key(self) -> list[Any]:
        """Identifies the files and how they are read."""
        files = {split: [path.suffix, file_digest(path)] for split, path in find_splits(self.files).items()}
        columns = [self.text, self.text_pair, self.label]
        split = [self.validation_fraction, self.seed] if self.files["validation"] is None else None
        return [files, columns, self.kind, self.label_names, self.metrics, split]

    def read(self) -> RawData:
        """Reads the files; see `TextDataModule.read`."""
        parts = {split: self._part(split, path) for split, path in find_splits(self.files).items()}
        for split, part in parts.items():
            if split != "test":
                check_labelled(split, part, self.label)
        names = self._names(parts["train"]) if self.kind == "classification" else []
        splits = {}
        for split, part in parts.items():
            if part.labels is None:
                splits[split] = part.to_dataset(None)
            elif self.kind == "regression":
                splits[split] = part.to_dataset(scores(part))
            else:
                ids = class_ids(part, _ids(names), names)
                if split == "train":
                    check_classes(part, ids, names)
                splits[split] = part.to_dataset(ids)
        if "validation" not in splits:
            whole = splits.pop("train")
            if len(whole) < 2:
                raise TooFewSamplesError(
                    parts["train"].path,
                    len(whole),
                    2,
                    "to train on some and validate on others",
                    "Add rows, or give a file to validate on as data.init_args.validation.",
                )
            order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(self.seed)).tolist()
            aside = min(max(1, round(self.validation_fraction * len(whole))), len(whole) - 1)
            splits["train"] = whole.select(sorted(order[aside:]))
            splits["validation"] = whole.select(sorted(order[:aside]))
        return RawData(splits, TargetSpec(type(self).__name__, self.kind, tuple(names), self.metrics))

    def _part(self, split: str, path: Path) -> LabelledText:
        wanted = {self.text: "data.init_args.text"}
        if self.text_pair is not None:
            wanted[self.text_pair] = "data.init_args.text_pair"
        if split != "test":
            wanted[self.label] = "data.init_args.label"
        columns = read_columns(path, wanted, [self.label])
        texts = []
        for column in [self.text, self.text_pair]:
            if column is None:
                continue
            for row, value in zip(columns.rows, columns.values[column], strict=True):
                if value is None:
                    raise MissingValueError(path, row, column)
            texts.append([str(value) for value in columns.values[column]])
        labels: list[object] | None = [_spelled(value) for value in columns.values.get(self.label, [])]
        if not labels or all(value in (None, "") for value in labels):
            labels = None
        return LabelledText(path, columns.rows, texts[0], texts[1] if len(texts) > 1 else None, labels)

    def _names(self, train: LabelledText) -> list[str]:
        if self.label_names is not None:
            return self.label_names
        assert train.labels is not None
        found = {str(value) for value in train.labels if value not in (None, "")}
        return sorted(found, key=int) if all(map(_is_integer, found)) else sorted(found)


def _spelled(value: object) -> str | None:
    """Spells a label the same way whichever format it was read from: 1, 1.0 and "1" are one class."""
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _is_integer(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def _ids(names: list[str]) -> dict[str, int]:
    """Ids by name, and by themselves unless the names are numbers too."""
    by_id = {} if any(map(_is_integer, names)) else {str(id_): id_ for id_ in range(len(names))}
    return by_id | {name: id_ for id_, name in enumerate(names)}
