"""The GLUE benchmark, from its official files or from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
from lightning.pytorch.utilities import rank_zero_warn

from lowrank_pl.contract import TargetSpec
from lowrank_pl.data.base import TextDataModule, check_choice
from lowrank_pl.data.cache import dataset_digest, file_digest
from lowrank_pl.data.files import BadLines, read_tsv
from lowrank_pl.data.glue_tasks import find_task
from lowrank_pl.data.raw import (
    EmptyTexts,
    LabelledText,
    RawData,
    check_classes,
    check_labelled,
    class_ids,
    scores,
    with_texts,
)
from lowrank_pl.errors.data import OfflineError

Genres = Literal["matched", "mismatched"]

_HUB = "nyu-mll/glue"
_STSB_SCORES = (0.0, 5.0)


class GLUE(TextDataModule):
    """A task of the GLUE benchmark.

    The score is computed on the validation split, in testing too: GLUE keeps the labels of its test files. They
    are what `predict` runs on.

    Args:
        tokenizer: Folder, hub id, or `pkg://module/sub/folder` of the encoder whose tokenizer is used. The
            command line sets it from `model.init_args.pretrained`.
        task: CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE or WNLI, in any case, with or without the hyphen.
        path: Folder with the official files `train.tsv`, `dev.tsv` (MNLI: `dev_matched.tsv`, `dev_mismatched.tsv`)
            and maybe `test.tsv`, or the folder above it. Without it the data come from the Hugging Face hub.
        mnli_validation: Validate MNLI on the genres of the training split, or on others.
        bad_lines: What to do with a line that has too few or too many columns (QQP's official file has some):
            stop and name it, or leave it out and say how many.
        empty_texts: What to do with a row in which a sentence is empty or white space: stop and name it, or leave it
            out and say how many.
        kwargs: What every datamodule takes, see `TextDataModule`.
    """

    hides_test_labels: ClassVar[bool] = True

    def __init__(
        self,
        tokenizer: str,
        task: str,
        path: str | None = None,
        mnli_validation: Genres = "matched",
        bad_lines: BadLines = "error",
        empty_texts: EmptyTexts = "error",
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        check_choice("mnli_validation", mnli_validation, Genres)
        check_choice("bad_lines", bad_lines, BadLines)
        check_choice("empty_texts", empty_texts, EmptyTexts)
        self.task = find_task(task)
        self.path = path
        self.mnli_validation = mnli_validation
        self.bad_lines = bad_lines
        self.empty_texts = empty_texts

    @property
    def expected_target(self) -> TargetSpec:
        """The task's, before anything is read."""
        return self.task.target

    def source_key(self) -> list[Any]:
        """Identifies the files, or the content of the hub's data set."""
        if self.path is None:
            splits = self._from_hub()
            digests = {name: dataset_digest(dataset) for name, dataset in splits.items()}
            return [self.task.hub, self.empty_texts, digests]
        digests = {split: file_digest(file) for split, file in self._files().items()}
        return [self.task.name, self.bad_lines, self.empty_texts, digests]

    def read(self) -> RawData:
        """Reads the task; see `TextDataModule.read`."""
        if self.path is None:
            parts, columns = {s: self._part_of_hub(rows) for s, rows in self._from_hub().items()}, self.task.hub_texts
        else:
            parts, columns = {s: self._part_of_file(s, file) for s, file in self._files().items()}, self.task.texts
        # The test split keeps all rows: GLUE's server wants a prediction for each.
        parts = {s: part if s == "test" else with_texts(part, columns, self.empty_texts) for s, part in parts.items()}
        names = self.task.label_names
        splits = {}
        for split, part in parts.items():
            if split != "test":
                check_labelled(split, part, self.task.label)
            if part.labels is None:
                splits[split] = part.to_dataset(None)
            elif names:
                ids = class_ids(part, self._ids(), list(self._ids()))
                if split == "train":
                    check_classes(part, ids, names)
                splits[split] = part.to_dataset(ids)
            else:
                splits[split] = part.to_dataset(scores(part, _STSB_SCORES))
        return RawData(splits, self.task.target)

    def _ids(self) -> dict[str, int]:
        spelled = self.path is not None and self.task.spelled
        return {name if spelled else str(id_): id_ for id_, name in enumerate(self.task.label_names)}

    def _files(self) -> dict[str, Path]:
        assert self.path is not None
        folder = Path(self.path).expanduser()
        if not (folder / "train.tsv").is_file() and (folder / self.task.name).is_dir():
            folder = folder / self.task.name
        which = f"_{self.mnli_validation}" if self.task.name == "MNLI" else ""
        files = {"train": folder / "train.tsv", "validation": folder / f"dev{which}.tsv"}
        test = folder / f"test{which}.tsv"
        return self.find_files({**files, "test": test} if test.is_file() else files, "data.init_args.path")

    def _part_of_file(self, split: str, file: Path) -> LabelledText:
        task = self.task
        # The labels of test files are missing or meaningless.
        labelled = split != "test"
        table = read_tsv(
            file,
            dict.fromkeys(
                [*task.texts, *([task.label] if labelled else [])], "data.init_args.task and data.init_args.path"
            ),
            header=task.header if labelled else None,
            bad_lines=self.bad_lines,
        )
        if table.skipped:
            rank_zero_warn(
                f"GLUE: left out {len(table.skipped)} malformed line(s) of {str(file)!r}, first {table.skipped[0]}."
            )
        pair = table.columns[task.texts[1]] if len(task.texts) > 1 else None
        labels: list[object] | None = list(table.columns[task.label]) if labelled else None
        return LabelledText(file, table.lines, table.columns[task.texts[0]], pair, labels)

    def _from_hub(self) -> dict[str, datasets.Dataset]:
        try:
            found = datasets.load_dataset(_HUB, self.task.hub)
        except (ConnectionError, TimeoutError) as error:
            raise OfflineError(
                f"{_HUB} ({self.task.hub})",
                error,
                f"Download the official {self.task.name} TSV files elsewhere and give their folder as "
                "data.init_args.path.",
            ) from error
        which = f"_{self.mnli_validation}" if self.task.name == "MNLI" else ""
        names = {"train": "train", "validation": f"validation{which}", "test": f"test{which}"}
        return {split: found[name] for split, name in names.items() if name in found}

    def _part_of_hub(self, rows: datasets.Dataset) -> LabelledText:
        texts = [list(rows[column]) for column in self.task.hub_texts]
        labels: list[object] = list(rows["label"])
        hidden = all(label == -1 for label in labels)
        pair = texts[1] if len(texts) > 1 else None
        where = f"{_HUB} ({self.task.hub}, {rows.split or 'rows'})"
        return LabelledText(where, range(1, len(labels) + 1), texts[0], pair, None if hidden else labels)
