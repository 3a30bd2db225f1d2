"""What an exported file is worth on a user's data: its scores beside those of the model that it was made of."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric, PearsonCorrCoef
from tqdm import tqdm
from transformers import PreTrainedModel

from lowrank_pl.checkpoint import SavedModel, build, read_saved_model
from lowrank_pl.checkpoint.building import auto_class_of
from lowrank_pl.contract import TargetSpec
from lowrank_pl.data import TextDataModule
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.errors.numerics import RangeError
from lowrank_pl.errors.run import ScoreDropError
from lowrank_pl.export.onnx_file import open_session, outputs_of
from lowrank_pl.monitoring.report import without_nan
from lowrank_pl.tasks import CausalLM, EncoderTask, MaskedLM, SequenceClassification, TokenClassification
from lowrank_pl.tasks.before_data import tell_target
from lowrank_pl.tasks.compatibility import check_same_target
from lowrank_pl.tasks.metrics import lower_is_better
from lowrank_pl.tasks.per_token import IGNORED

DataFactory = Callable[[str], TextDataModule]
"""Makes a datamodule for the tokenizer of a model."""
Run = Callable[[Mapping[str, Tensor]], Tensor]
"""Logits of a batch without labels."""

_TASKS = (SequenceClassification, TokenClassification, MaskedLM, CausalLM)
_SPLIT = "validation"
_ROUNDING = 1e-6
"""Of scores in float32: a drop that is exactly what is allowed must not fail."""


def check_scoring(data: object, max_drop: float | None, max_samples: int | None) -> None:
    """Raises an error for options of the scores that cannot be followed.

    Raises:
        RangeError: `max_drop` is negative or no number, or `max_samples` below 1.
        MissingArgumentError: one of them is given without data.
    """
    if max_drop is not None and not 0 <= max_drop < math.inf:
        raise RangeError("max_drop", max_drop, "0 or more, in the unit of the score")
    if max_samples is not None and max_samples < 1:
        raise RangeError("max_samples", max_samples, "1 or more, or null for all")
    for name, value in (("max_drop", max_drop), ("max_samples", max_samples)):
        if data is None and value is not None:
            remedy = "Name them with --data (and --data.init_args…), or the configuration of a run with --config."
            raise MissingArgumentError(f"what {name} is measured on, the data,", remedy)


class Scoring:
    """Scores two ways of computing a model's logits on the validation split of some data.

    Args:
        saved: The model that is exported; says what it predicts.
        data: Makes the datamodule.
        tokenizer: Of the model.
        max_samples: Score on so many samples at most, the first of the split's fixed random order.

    Raises:
        CheckpointMismatchError: the model predicts something else than the data ask for.
        MissingSplitError: there is no validation split; and whatever else data raise.
    """

    def __init__(self, saved: SavedModel, data: DataFactory, tokenizer: str, max_samples: int | None = None) -> None:
        assert saved.target is not None
        self._data = data(tokenizer)
        self._data.serves = TrainerFn.VALIDATING
        self._kind = next(task for task in _TASKS if saved.target.kind in task.kinds)
        tell_target(self._task(saved.target), self._data)
        self._data.prepare_data()
        self._data.setup("validate")
        self.target: TargetSpec = self._data.target
        check_same_target(saved, self.target)
        size = self._data.split(_SPLIT).num_rows
        self.samples = size if max_samples is None else min(size, max_samples)

    def compare(self, before: Run, after: Run, max_drop: float | None = None) -> dict[str, Any]:
        """Scores both, showing the progress.

        Args:
            before: The model.
            after: The file.
            max_drop: By how much the score of the file may be worse.

        Returns:
            For report.json: `before` and `after` with loss, metrics and score, `drop` (positive where the file is
            worse), and how far predictions agree: `agreement`, the share of equal classes, or for values their
            `correlation` and `mean_distance`; data, number of samples and `max_drop`. `None` for what is NaN, as the
            correlation of equal values is.

        Raises:
            ScoreDropError: the file is worse by more than `max_drop`.
        """
        tasks = {"before": self._task(self.target), "after": self._task(self.target)}
        agreement = _Agreement(self.target.kind == "regression")
        for task in tasks.values():
            task.on_validation_epoch_start()
        for inputs, labels in self._batches():
            logits = {"before": before(inputs).float(), "after": after(inputs).float()}
            for side, task in tasks.items():
                task.add_to_scores("val", logits[side], labels)
            first, second = (tasks[side].predictions(logits[side]) for side in logits)
            agreement.add(first, second, labels)
        told = {side: {k: float(v) for k, v in task.scores("val").items()} for side, task in tasks.items()}
        old, new = (told[side]["score"] for side in told)
        drop = new - old if lower_is_better(self.target) else old - new
        metric = self.target.score or " + ".join(self.target.metrics)
        if max_drop is not None and not drop <= max_drop + _ROUNDING:  # also for NaN
            raise ScoreDropError(metric, old, new, drop, max_drop, self.samples)
        found = {
            "task": self.target.name,
            "metric": metric,
            "split": _SPLIT,
            "samples": self.samples,
            "fingerprint": self._data.fingerprint,
            **told,
            "drop": drop,
            "max_drop": max_drop,
            **agreement.told(),
        }
        ready: dict[str, Any] = without_nan(found)
        return ready

    def _task(self, target: TargetSpec) -> EncoderTask:
        task = self._kind()
        task.target = target
        return task

    def _batches(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        left = self.samples
        with tqdm(total=left, desc="Scores", unit="samples", file=sys.stdout) as bar:
            for batch in self._data.val_dataloader():
                cut = {name: tensor[:left] for name, tensor in batch.items()}
                labels = cut.pop("labels")
                yield cut, labels
                bar.update(len(labels))
                left -= len(labels)
                if left <= 0:
                    return


class _Agreement:
    """How far the predictions of two models agree on labelled texts, or tokens."""

    def __init__(self, of_values: bool) -> None:
        self._of_values = of_values
        self._mean = MeanMetric()
        self._correlation = PearsonCorrCoef()

    def add(self, first: Tensor, second: Tensor, labels: Tensor) -> None:
        """Adds the predictions of a batch."""
        if self._of_values:
            self._mean.update((first - second).abs())
            self._correlation.update(first, second)
        else:
            labelled = (labels != IGNORED) & (first != IGNORED)  # nothing predicts the first token of a window
            self._mean.update((first == second)[labelled].float())

    def told(self) -> dict[str, float]:
        """For report.json."""
        mean = float(self._mean.compute())
        if not self._of_values:
            return {"agreement": mean}
        return {"correlation": float(self._correlation.compute()), "mean_distance": mean}


def in_torch(model: nn.Module) -> Run:
    """What a model computes."""

    @torch.inference_mode()
    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = model(**inputs).logits
        return logits

    return run


def in_onnxruntime(path: Path) -> Run:
    """What an ONNX file computes."""
    session = open_session(path)
    wanted = [value.name for value in session.get_inputs()]

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        ids = inputs["input_ids"]
        # What models take where there is none: windows of a corpus have no mask, some tokenizers make no token types.
        absent = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        return outputs_of(session, {name: inputs[name] if name in inputs else absent[name] for name in wanted})

    return run


def as_written(folder: Path, saved: SavedModel) -> PreTrainedModel:
    """The model of a folder that was just written, read back."""
    return build(read_saved_model(str(folder)), auto_class_of(saved), as_saved=True)


def score_lines(scores: Mapping[str, Any]) -> list[str]:
    """The same for people: a sentence on the data, a table, and how far predictions agree."""
    before, after = scores["before"], scores["after"]
    rows = [f"| {name} | {number(before[name])} | {number(after[name])} |" for name in before]
    allowed = "" if scores["max_drop"] is None else f", allowed was {scores['max_drop']:g}"
    if "agreement" in scores:
        agreement = f"* predictions: {scores['agreement']:.2%} are the same"
    else:
        told = f"correlation {number(scores['correlation'])}, mean distance {number(scores['mean_distance'])}"
        agreement = f"* predictions: {told}"
    return [
        f"{scores['task']}, {scores['samples']:,} samples of the {scores['split']} split (data fingerprint "
        f"`{scores['fingerprint']}`); the score is {scores['metric']}:",
        "",
        "| | model | this file |",
        "|---|---|---|",
        *rows,
        "",
        f"* {_drop_told(scores['drop'])}{allowed}",
        agreement,
    ]


def _drop_told(drop: float | None) -> str:
    if drop is None:
        return "the scores cannot be compared: one is not defined"
    if not drop:
        return "the score is the same"
    return f"the score is {abs(drop):.4f} {'worse' if drop > 0 else 'better'}"


def number(value: float | None) -> str:
    """For tables of scores."""
    return "n/a" if value is None else f"{value:.4f}"
