"""Tokenised splits with what is known about them, on disk and in memory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, load_from_disk
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lowrank_pl.contract import TargetSpec
from lowrank_pl.data.cache import dataset_digest, set_aside, written_whole
from lowrank_pl.data.tokenise import Truncation

_META = "meta.json"
_TEXTS = "texts"
_WARN_TRUNCATED = 0.05


@dataclass(frozen=True)
class Prepared:
    """A data set ready for training.

    Attributes:
        splits: Model inputs, `labels` (except in an unlabelled test split) and `length`, by split.
        target: What the labels mean.
        truncation: What was cut off, by split.
        content: Identifies the rows, by split.
        lengths: Tokens of each sample, by split.
        texts: Raw rows without labels, by split, of splits that may be predicted on.
    """

    splits: DatasetDict
    target: TargetSpec | None
    truncation: dict[str, Truncation]
    content: dict[str, str]
    lengths: dict[str, list[int]]
    texts: dict[str, Dataset]

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether `write` has run on this folder."""
        return (folder / _META).is_file()

    @staticmethod
    def write(
        folder: Path,
        splits: dict[str, Dataset],
        target: TargetSpec | None,
        truncation: dict[str, Truncation],
        texts: dict[str, Dataset],
    ) -> None:
        """Writes a prepared data set to a folder, whole or not at all; what is there and not whole makes room."""
        meta = {
            "target": None if target is None else target.to_dict(),
            "texts": list(texts),
            "truncation": {split: asdict(cut) for split, cut in truncation.items()},
            "content": {split: dataset_digest(dataset) for split, dataset in splits.items()},
        }
        with written_whole(folder) as temporary:
            DatasetDict(splits).save_to_disk(str(temporary))
            for split, dataset in texts.items():
                dataset.save_to_disk(str(temporary / _TEXTS / split))
            (temporary / _META).write_text(json.dumps(meta, indent=2), encoding="utf-8")
            if folder.is_dir() and not Prepared.exists(folder):
                set_aside(folder)

    @classmethod
    def read(cls, folder: Path) -> Prepared:
        """Reads what `write` wrote; rows stay on disk until asked for."""
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        splits = load_from_disk(str(folder))
        assert isinstance(splits, DatasetDict)
        return cls(
            splits,
            None if meta["target"] is None else TargetSpec.from_dict(meta["target"]),
            {split: Truncation(**cut) for split, cut in meta["truncation"].items()},
            meta["content"],
            {split: list(dataset["length"]) for split, dataset in splits.items()},
            {split: Dataset.load_from_disk(str(folder / _TEXTS / split)) for split in meta["texts"]},
        )


def tell_truncation(name: str, max_length: int, truncation: dict[str, Truncation]) -> None:
    """Says how many samples of which split were cut, and warns if it is more than a few."""
    for split, cut in truncation.items():
        longest = f"the longest has {cut.longest} tokens."
        if not cut.truncated:
            rank_zero_info(f"{name}: {cut.samples} {split} samples, none cut; {longest}")
            continue
        told = f"{cut.truncated} of {cut.samples} {split} samples ({cut.share:.1%})"
        message = f"{name}: {told} were cut at max_length={max_length}; {longest}"
        if cut.share > _WARN_TRUNCATED:
            rank_zero_warn(f"{message} Raise data.init_args.max_length if the model allows it.")
        else:
            rank_zero_info(message)


def tell_missing_classes(name: str, prepared: Prepared) -> None:
    """Warns of classes that no training sample has, as a small `max_train_samples` leaves them."""
    target, train = prepared.target, prepared.splits.get("train")
    if target is None or target.kind != "classification" or train is None or "labels" not in train.column_names:
        return
    there = set(train.unique("labels"))
    missing = [label for id_, label in enumerate(target.label_names) if id_ not in there]
    if missing:
        told = ", ".join(map(repr, missing))
        rank_zero_warn(
            f"{name}: no training sample is of class {told}, which the model cannot learn. Give more samples, or raise "
            "data.init_args.max_train_samples."
        )
