"""Labelled texts in files of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lowrank_pl.contract import MetricName, TargetSpec
from lowrank_pl.data.base import TextDataModule, check_choice
from lowrank_pl.data.cache import file_digest
from lowrank_pl.data.files import find_file
from lowrank_pl.data.formats import has_column, read_columns
from lowrank_pl.data.labels import class_names, ids_by_class, is_compound, spelled
from lowrank_pl.data.needed_files import can_do_without
from lowrank_pl.data.prepared import Prepared
from lowrank_pl.data.raw import (
    EmptyTexts,
    LabelledText,
    RawData,
    check_classes,
    check_labelled,
    scores,
    with_texts,
)
from lowrank_pl.errors.data import ArgumentRangeError, TooFewSamplesError
from lowrank_pl.errors.data_files import MissingSplitError, NotATextError
from lowrank_pl.errors.labels import UnknownClassesError
from lowrank_pl.errors.run import TargetKindError

LabelKind = Literal["classification", "regression"]

_METRICS: dict[str, tuple[MetricName, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
}


class TextFiles(TextDataModule):
    """Texts, or pairs of texts, with a class or a number: CSV, TSV, JSON Lines, Parquet or text files.

    CSV may be quoted; in TSV a quotation mark is a character like any other. Both start with a header line. A `.txt`
    file has a text per line and nothing else.

    Without a training split there is nothing to learn the classes from: a model that is scored or predicts tells them
    then, and their order. The same where its file is not there, or has no column of labels: only `fit` needs that, and
    calibration at observed labels (`calibration.labels: sampled` does not).

    Args:
        tokenizer: Folder, hub id, or `pkg://module/sub/folder` of the encoder whose tokenizer is used. The
            command line sets it from `model.init_args.pretrained`.
        train: File of the training split; its extension gives its format. `validate`, `test` and `predict` can do
            without.
        validation: File of the validation split; without it a part of the training split is set aside.
        test: File of the test split, labelled or not.
        predict: File of texts for the verb `predict`, which then reads nothing else; labels in it are not looked at.
            Without it `predict` runs on the test split, or else on the validation split.
        text: Column of the text.
        text_pair: Column of the second text, if there are two.
        label: Column of the label; in the training and validation split, but see above.
        kind: Whether labels are classes or numbers.
        label_names: Class names in the order of their ids; labels may then be names or ids. Without it the
            labels of the training split, sorted, are the names, or else those of the model. 1 and 1.0 are one label.
        metrics: Metrics whose mean is the score; accuracy for classes, pearson and spearman for numbers if not given.
        validation_fraction: Part of the training file to validate on if there is no validation file, chosen by
            `seed`.
        empty_texts: What to do with a row whose text (of a pair: one of them) is missing, empty or white space: stop
            and name it, or leave it out and say how many.
        kwargs: What every datamodule takes, see `TextDataModule`.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "label",
        kind: LabelKind = "classification",
        label_names: list[str] | None = None,
        metrics: list[MetricName] | None = None,
        validation_fraction: float = 0.1,
        predict: str | None = None,
        empty_texts: EmptyTexts = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        check_choice("kind", kind, LabelKind)
        check_choice("empty_texts", empty_texts, EmptyTexts)
        allowed = _METRICS[kind]
        for metric in metrics or ():
            if metric not in allowed:
                raise ArgumentRangeError("metrics", metric, f"for {kind} any of {', '.join(allowed)}")
        if not 0 < validation_fraction < 1:
            raise ArgumentRangeError("validation_fraction", validation_fraction, "above 0 and below 1")
        if label_names is not None and not 2 <= len(set(label_names)) == len(label_names):
            raise ArgumentRangeError("label_names", label_names, "two or more names, all different")
        if label_names is not None and kind == "regression":
            raise ArgumentRangeError("label_names", label_names, "null for kind='regression', which has no classes")
        for name, column in (("text", text), ("label", label)):
            if not isinstance(column, str):
                raise ArgumentRangeError(name, column, "the name of a column")
        self.files: dict[str, str | None] = {"train": train, "validation": validation, "test": test}
        self.to_predict = predict
        self.text = text
        self.text_pair = text_pair
        self.label = label
        self.kind = kind
        self.label_names = label_names
        self.metrics_given = metrics is not None
        self.metrics = tuple(metrics) if metrics else (allowed[:1] if kind == "classification" else allowed)
        self.validation_fraction = validation_fraction
        self.empty_texts = empty_texts
        self._adopted: TargetSpec | None = None
        self._new_texts: Prepared | None = None

    # Without a training split.

    @property
    def expected_target(self) -> TargetSpec | None:
        """From the arguments, if the labels are to be learnt; else from the model."""
        if self.lacks_target:
            return self._adopted
        return self._target(self.label_names or ())

    @property
    def lacks_target(self) -> bool:
        """Whether there is no labelled training split, or none is read, to tell the classes."""
        return self._predicts_new_texts or not self._train_tells

    @property
    def _train_tells(self) -> bool:
        """Whether the training split is there and labelled: where nothing is trained, it need not be."""
        train = self.files["train"]
        if train is None or not can_do_without("train", self.verb, self.files):
            return train is not None
        path = Path(train).expanduser()
        return path.is_file() and has_column(path, self.label)

    @property
    def place_of_labels(self) -> str:
        """The column."""
        return f" in column {self.label!r}, see data.init_args.label"

    def adopt_target(self, target: TargetSpec) -> None:
        """Takes over the kind, the classes and, unless they were given, the metrics of a model.

        Raises:
            TargetKindError: the model predicts something per token.
        """
        if target.kind not in _METRICS:
            raise TargetKindError(f"a model of {target.name!r}", (target.kind,), type(self).__name__, self.kind)
        if target != self._adopted and not self._predicts_new_texts:
            self._prepared = None  # its labels may stand for other classes
        self._adopted = target

    def _target_found(self) -> TargetSpec | None:
        return self._adopted if self._predicts_new_texts else super()._target_found()

    @property
    def _predicts_new_texts(self) -> bool:
        return self.to_predict is not None and self.verb == TrainerFn.PREDICTING

    def prepare(self) -> None:
        """Prepares the splits, or only the new texts where they are what `predict` runs on."""
        if self._predicts_new_texts:
            self._prepare_new_texts()
        else:
            self._check_splits()
            super().prepare()

    def _check_splits(self) -> None:
        """Raises `MissingSplitError` where the run trains and there is no training file, or there is none at all."""
        fits = self.verb == TrainerFn.FITTING
        if not any(self.files.values()) or (fits and self.files["train"] is None):
            given = [split for split, file in self.files.items() if file is not None]
            wanted = "train" if fits else "validation or test"
            raise MissingSplitError(wanted, given, f"Give data.init_args.{wanted.replace(' or ', ' or .')}.")

    def setup(self, stage: str | None = None) -> None:
        """Loads what `prepare_data` has prepared."""
        if self._predicts_new_texts:
            self._new_texts = self._prepare_new_texts()
        else:
            self._check_splits()
            super().setup(stage)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The new texts in the order of their file; see `TextDataModule.predict_dataloader`."""
        if self._new_texts is None or not self._predicts_new_texts:
            return super().predict_dataloader()
        return self.loader_in_order("predict", self._new_texts.splits["predict"])

    def predicted_rows(self) -> Sequence[Mapping[str, Any]] | None:
        """Texts with the `row` of the file; see `TextDataModule.predicted_rows`."""
        if self._new_texts is None or not self._predicts_new_texts:
            return super().predicted_rows()
        rows: Sequence[Mapping[str, Any]] = self._new_texts.texts["predict"]
        return rows

    def _prepare_new_texts(self) -> Prepared:
        path = find_file(str(self.to_predict), "data.init_args.predict")
        key = ["new texts", path.suffix, file_digest(path), self.text, self.text_pair, self.empty_texts]
        return self.prepared(key, lambda: RawData({"predict": self._rows_of(path)}, None))

    def _rows_of(self, path: Path) -> Dataset:
        part = self._part("predict", path)
        return part.to_dataset(None).add_column("row", list(part.rows))

    # With labels.

    def source_key(self) -> list[Any]:
        """Identifies the files and how they are read."""
        files = {split: [path.suffix, file_digest(path)] for split, path in self.find_files(self.files).items()}
        columns = [self.text, self.text_pair, self.label]
        split = [self.validation_fraction, self.seed] if self.files["validation"] is None else None
        return [files, columns, self._target(self._given_names() or ()).to_dict(), self.empty_texts, split]

    def read(self) -> RawData:
        """Reads the files; see `TextDataModule.read`."""
        parts = {split: self._part(split, path) for split, path in self.find_files(self.files).items()}
        for split, part in parts.items():
            if self._has_to_be_labelled(split):
                check_labelled(split, part, self.label)
        kind = self._target(()).kind
        names = self._names(parts) if kind == "classification" else []
        splits = {}
        for split, part in parts.items():
            if part.labels is None:
                splits[split] = part.to_dataset(None)
            elif kind == "regression":
                splits[split] = part.to_dataset(scores(part))
            else:
                ids = ids_by_class(part, names, may_be_ids=self._given_names() is not None)
                if split == "train":
                    check_classes(part, ids, names)
                splits[split] = part.to_dataset(ids)
        if "train" in splits and self.files["validation"] is None:
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
        if kind == "classification" and not names:
            return RawData(splits, None)
        return RawData(splits, self._target(names))

    def _part(self, split: str, path: Path) -> LabelledText:
        wanted = {self.text: "data.init_args.text"}
        if self.text_pair is not None:
            wanted[self.text_pair] = "data.init_args.text_pair"
        if self._has_to_be_labelled(split):
            wanted[self.label] = "data.init_args.label"
        columns = read_columns(path, wanted, [self.label] if split != "predict" else [])
        names = [column for column in (self.text, self.text_pair) if column is not None]
        texts = [columns.values[column] for column in names]
        labels: list[object] | None = None
        if split != "predict":
            given = columns.values.get(self.label, [])
            for row, value in zip(columns.rows, given, strict=False):
                if is_compound(value):
                    raise NotATextError(path, row, self.label, value)
            labels = [spelled(value) for value in given]
        if not labels or all(value in (None, "") for value in labels):
            labels = None
        part = LabelledText(path, columns.rows, texts[0], texts[1] if len(texts) > 1 else None, labels)
        return with_texts(part, names, self.empty_texts)

    def _has_to_be_labelled(self, split: str) -> bool:
        return split == "validation" or (split == "train" and self._train_tells)

    def _target(self, names: Sequence[str]) -> TargetSpec:
        """What is predicted: what the arguments say, or the model where there is nothing to learn it from."""
        own = TargetSpec(type(self).__name__, self.kind, tuple(names), self.metrics)
        if self._adopted is None or not self.lacks_target:
            return own
        if self.metrics_given and self._adopted.kind == self.kind:
            return own
        return replace(self._adopted, name=own.name, label_names=own.label_names)

    def _given_names(self) -> list[str] | None:
        adopted = list(self._adopted.label_names) if self._adopted is not None and self.lacks_target else []
        return self.label_names or adopted or None

    def _names(self, parts: Mapping[str, LabelledText]) -> list[str]:
        if (given := self._given_names()) is not None:
            return given
        if "train" not in parts or parts["train"].labels is None:
            for split, part in parts.items():
                if part.labels is not None:
                    raise self._left_out.get("train") or UnknownClassesError(split, part.path)
            return []
        labels = parts["train"].labels
        assert labels is not None
        return class_names(None if label is None else str(label) for label in labels)
