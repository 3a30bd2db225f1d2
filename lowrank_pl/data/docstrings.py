"""A classification task that every machine carries: which library does a docstring come from?"""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from typing import Any

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info

from lowrank_pl.contract import TargetSpec
from lowrank_pl.data.base import TextDataModule
from lowrank_pl.data.cache import tree_digest
from lowrank_pl.data.docstring_harvest import KNOWN, Sentence, harvest, package_sources, split_of
from lowrank_pl.data.raw import SPLITS, RawData
from lowrank_pl.errors.data import ArgumentRangeError, EmptyDataError, TooFewPackagesError


class Docstrings(TextDataModule):
    """First sentences of docstrings of installed packages, to be told apart by package. Needs no download.

    The packages' names are masked, equal sentences are kept once, and the name of the documented function decides
    the split. Which sentences there are depends on the versions installed: compare scores on one machine only.

    Args:
        tokenizer: Folder, hub id, or `pkg://module/sub/folder` of the encoder whose tokenizer is used. The
            command line sets it from `model.init_args.pretrained`.
        packages: Import names of installed packages, at least two; torch, transformers, pandas, scipy, sklearn,
            numpy, lightning and torchmetrics as far as installed if not given.
        max_per_class: Sentences per package over all splits; which ones does not depend on chance.
        kwargs: What every datamodule takes, see `TextDataModule`.
    """

    def __init__(
        self,
        tokenizer: str,
        packages: list[str] | None = None,
        max_per_class: int = 1500,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        if max_per_class < 1:
            raise ArgumentRangeError("max_per_class", max_per_class, "1 or more")
        self.packages = packages
        self.max_per_class = max_per_class

    @property
    def expected_target(self) -> TargetSpec:
        """What is known before anything is read."""
        return TargetSpec(type(self).__name__, "classification")

    def source_key(self) -> list[Any]:
        """Identifies the sources by path, size and time of change."""
        sources = package_sources(self.packages)
        # Pairs, because the order of the packages is that of the labels.
        return [[[package, tree_digest(files)] for package, files in sources.items()], self.max_per_class]

    def read(self) -> RawData:
        """Reads the sources; see `TextDataModule.read`."""
        sources = package_sources(self.packages)
        if len(sources) < 2:
            raise TooFewPackagesError(list(sources), self.packages or KNOWN)
        chosen = balanced(harvest(sources), self.max_per_class)
        names = tuple(package for package in sources if any(s.package == package for s in chosen))
        if len(names) < 2:
            raise TooFewPackagesError(names, self.packages or KNOWN)
        splits = {}
        for split in SPLITS:
            rows = [sentence for sentence in chosen if split_of(sentence.name) == split]
            if not rows:
                raise EmptyDataError(f"{split} split of the docstrings of {', '.join(names)}")
            labels = [names.index(sentence.package) for sentence in rows]
            splits[split] = Dataset.from_dict({"text": [sentence.text for sentence in rows], "labels": labels})
            counts = Counter(sentence.package for sentence in rows)
            told = ", ".join(f"{name} {counts[name]}" for name in names)
            rank_zero_info(f"Docstrings: {len(rows)} {split} sentences: {told}.")
        return RawData(splits, TargetSpec(type(self).__name__, "classification", names))


def balanced(sentences: list[Sentence], at_most: int) -> list[Sentence]:
    """Keeps at most so many sentences of each package: those whose hash comes first."""
    kept: Counter[str] = Counter()
    result = []
    for sentence in sorted(sentences, key=lambda s: sha256(f"{s.name} {s.text}".encode()).digest()):
        if kept[sentence.package] < at_most:
            kept[sentence.package] += 1
            result.append(sentence)
    return sorted(result)
