"""The report of a run as far as it is about the checkpoint that is exported."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lowrank_pl.checkpoint import CHECKPOINT_NAME, SavedModel
from lowrank_pl.errors.arguments import MissingArgumentError
from lowrank_pl.monitoring.earlier_run import reports_in
from lowrank_pl.monitoring.report import told_of_model
from lowrank_pl.tasks import budget_score

logger = logging.getLogger(__name__)

_OF_AN_EXPORT = ("onnx", "int8", "export_scores")
"""Entries that an export adds to the report of a run: those of an earlier one say nothing of this."""
_OF_THE_END = (
    *("metrics", "score_step", "score_dense", "metrics_dense", "epochs", "seconds"),
    *("checkpoint", "checkpoint_score", "checkpoint_monitor", "checkpoint_at_budget"),
)
"""Entries about the model that a run ended with, or about another checkpoint."""
_SCORES = ("val/score", budget_score.KEY)
_REMEDY = "Give a report.json that a run has written with --report, or remove the damaged one."


def report_for(saved: SavedModel, encoder: nn.Module, source: Path, asked: str | None) -> dict[str, Any]:
    """What is known of a checkpoint: of the run's report what holds for all of it, and the score if it is this one's.

    Ranks, parameters, cost and notes are those of the checkpoint's own record, whatever the run came to later.

    Args:
        saved: The checkpoint.
        encoder: Built from it.
        source: Where it lies.
        asked: The report that the user names; by default those of the checkpoint's run.

    Returns:
        JSON-ready; without a score `score_note` says why. Empty where there is no report.

    Raises:
        MissingArgumentError: the report that was asked for is not there, or one is damaged.
    """
    found = [(place, _read(place)) for place in _places(source, asked)]
    if not found:
        return {}
    scores = [_score_entries(report, place, saved, source) for place, report in found]
    best = next((at for at, entries in enumerate(scores) if entries is not None), 0)
    (_, report), score = found[best], scores[best]
    record = saved.compression
    own: dict[str, Any] = {} if saved.step is None else {"steps": saved.step}
    if record is not None:
        total = sum(parameter.numel() for parameter in encoder.parameters())
        own |= told_of_model(record, record.layers, total)
    if score is None:
        report = {name: entry for name, entry in report.items() if name not in _OF_THE_END}
        step = found[best][1].get("score_step", found[best][1].get("steps"))
        told = "the report's score is that of " + (
            "another checkpoint" if step is None else f"step {step:,} of the run"
        )
        told += "" if saved.step is None else f", this checkpoint is of step {saved.step:,}"
        score = {"score": None, "metrics": {}, "score_note": told}
        logger.warning("%s: no score is quoted: %s", saved.source, told)
    return {**report, **own, **score}


def _score_entries(report: Mapping[str, Any], place: Path, saved: SavedModel, source: Path) -> dict[str, Any] | None:
    """What replaces the scores of a report so that they are those of a checkpoint; `None` where it has none of it."""
    name, verb, given = source.name, report.get("verb"), report.get("checkpoint")
    beside = place.parent.resolve() == (source if source.is_dir() else source.parent).resolve()
    if source.is_dir() and beside:
        return {}
    if verb == "fit":
        step = report.get("score_step", report.get("steps"))
        if step is not None and step == saved.step:
            return {}
        if given is not None and Path(given).name == name != "last.ckpt" and report.get("checkpoint_score") is not None:
            known = report.get("checkpoint_monitor") in _SCORES
            return {"score": report.get("checkpoint_score") if known else None, "metrics": {}, "score_step": saved.step}
        # A report that does not tell its step.
        return {} if step is None and name == "last.ckpt" else None
    if verb == "compress":
        return {} if name == CHECKPOINT_NAME and beside else None
    if verb == "test" and given is not None:
        same = Path(given).samefile(source) if Path(given).exists() else Path(given).name == name
        return {} if same else None
    return {}


def _places(source: Path, asked: str | None) -> list[Path]:
    """The reports to look into, the newest of a folder first.

    Raises:
        MissingArgumentError: the one that was asked for is not there.
    """
    if asked:
        place = Path(asked).expanduser()
        if not place.is_file():
            raise MissingArgumentError(f"the report {asked!r}", "Give a report.json, or leave --report out.")
        return [place]
    start = source if source.is_dir() else source.parent
    for folder in (start, start.parent):
        if places := reports_in(folder):
            return places
    return []


def _read(place: Path) -> dict[str, Any]:
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MissingArgumentError(f"a readable report in {str(place)!r} ({error})", _REMEDY) from error
    if not isinstance(found, dict):
        raise MissingArgumentError(f"a report in {str(place)!r}", _REMEDY)
    return {name: entry for name, entry in found.items() if name not in _OF_AN_EXPORT}
