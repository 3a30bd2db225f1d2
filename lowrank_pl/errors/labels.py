"""What can be wrong with labels and targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank_pl.errors.base import LowRankError
from lowrank_pl.errors.data import DataError
from lowrank_pl.errors.wording import listed, place


class UnknownTargetError(DataError):
    """Texts alone, for which it is not known what is to be predicted.

    Args:
        data: The class of the data.
    """

    def __init__(self, data: str) -> None:
        super().__init__(
            f"these {data} have no labels, and no model has told what it predicts. Run them through a trainer with a "
            "model that does: a checkpoint (ckpt_path, init_from), or one that is loaded or trained already."
        )


class UnknownClassesError(DataError):
    """Labelled data whose classes are not known.

    Args:
        split: The split that is labelled.
        path: Its file.
    """

    def __init__(self, split: str, path: str | Path) -> None:
        super().__init__(
            f"the {split} split in {str(path)!r} is labelled, and without a labelled training split nothing tells the "
            "classes and their order. Give the checkpoint to be scored (--ckpt_path or model.init_args.init_from), "
            "data.init_args.label_names, or data.init_args.train."
        )


class MissingLabelsError(DataError):
    """A split that must be labelled and is not.

    Args:
        split: The split.
        path: Where it came from.
        column: The column that holds no labels.
    """

    def __init__(self, split: str, path: str | Path, column: str) -> None:
        super().__init__(
            f"the {split} split in {str(path)!r} has no labels in column {column!r}; "
            "only the test split may lack them. Check the file and data.init_args.label."
        )


class UnknownLabelError(DataError):
    """A label that is not one of the classes, or is outside the range of the score.

    Args:
        path: The file.
        row: Number of the line or row, counted from 1.
        value: The label found.
        allowed: Class names, or the range in words.
    """

    def __init__(self, path: str | Path, row: int, value: object, allowed: Sequence[str] | str) -> None:
        told = allowed if isinstance(allowed, str) else listed(allowed)
        super().__init__(
            f"{place(path, row)} is labelled {value!r}; allowed are {told}. "
            "Correct the row, or check that the label column is the right one and that no class is left out."
        )


class NotANumberError(DataError):
    """A regression target that is not a finite number.

    Args:
        path: The file.
        row: Number of the line or row, counted from 1.
        value: The target found.
    """

    def __init__(self, path: str | Path, row: int, value: object) -> None:
        super().__init__(
            f"{place(path, row)} has the regression target {value!r}; allowed are finite numbers. "
            "Correct the row, or use kind='classification' if the labels are class names."
        )


class SingleClassError(DataError):
    """A training split in which every sample has the same label.

    Args:
        path: Where the split came from.
        label: The only label.
        rows: Number of samples.
    """

    def __init__(self, path: str | Path, label: object, rows: int) -> None:
        super().__init__(
            f"all {rows} training samples of {str(path)!r} are labelled {label!r}; at least two classes are needed "
            "to learn and to calibrate. Check that the label column is the right one and the file is not cut off."
        )


class BadTagError(DataError):
    """A tag that is not of the BIO scheme.

    Args:
        path: The file.
        line: Number of the line, counted from 1.
        tag: The tag found.
    """

    def __init__(self, path: str | Path, line: int, tag: str) -> None:
        super().__init__(
            f"{place(path, line)} has the tag {tag!r}; allowed are 'O', 'B-<type>' and 'I-<type>'. "
            "Check data.init_args.tag_column, or convert the file to BIO."
        )


class LabelsError(LowRankError):
    """The samples that a method calibrates on have no labels, and none can be drawn.

    Args:
        task: The class of the task.
        problem: What is missing.
        instead: The value of `calibration.labels` that would do; empty if none would.
    """

    def __init__(self, task: str, problem: str, instead: str = "") -> None:
        key = "model.init_args.strategy.init_args.calibration.labels"
        meaning = {"observed": "take those of the data", "sampled": "draw them from what the model predicts"}
        remedy = f"Set {key} to {instead!r} to {meaning[instead]}" if instead else "Give data that have labels"
        super().__init__(
            f"{task} cannot be calibrated: {problem}. {remedy}, or use a method that measures nothing, such as SVD."
        )
