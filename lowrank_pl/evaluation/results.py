"""What the harness has found for each model, for a program (JSON) and for a person (Markdown)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_pl.files import replace_text
from lowrank_pl.files.atomic import errors_told


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        metric: As the harness calls it.
        filter: What was done to the answers before they were scored; `"none"` as a rule.
        value: Of the metric.
        stderr: Of the value over the questions, where the harness computes one.
        higher_is_better: Where the task tells.
    """

    metric: str
    filter: str
    value: float | str
    stderr: float | None
    higher_is_better: bool | None

    def __str__(self) -> str:
        value = self.value if isinstance(self.value, str) else f"{self.value:.4f}"
        return value if self.stderr is None else f"{value} ± {self.stderr:.4f}"


@dataclass(frozen=True)
class TaskScores:
    """One task or group.

    Attributes:
        version: Of the task, as its file tells.
        num_fewshot: Solved examples before every question.
        samples: Questions that were asked, and how many there are; `None` for groups.
        scores: Of one model.
    """

    version: str | float | None
    num_fewshot: int | None
    samples: tuple[int, int] | None
    scores: list[Score]


def scores_of(found: Mapping[str, Any]) -> dict[str, TaskScores]:
    """Scores by task and group from what `lm_eval.simple_evaluate` returns."""
    tasks = {}
    for name, values in {**found["results"], **found.get("groups", {})}.items():
        better = found.get("higher_is_better", {}).get(name, {})
        scores = []
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float, str)):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            scores.append(Score(metric, kind, value, float(stderr) if known else None, better.get(metric)))
        counts = found.get("n-samples", {}).get(name)
        tasks[name] = TaskScores(
            found.get("versions", {}).get(name),
            found.get("n-shot", {}).get(name),
            None if counts is None else (int(counts["effective"]), int(counts["original"])),
            scores,
        )
    return tasks


@dataclass
class Results:
    """Everything that one call of `lowrank-pl evaluate` has found so far.

    Attributes:
        circumstances: Versions, device, numbers of the request, where the models lie, the command.
        parameters: By model.
        tasks: By model, then by task.
    """

    circumstances: dict[str, Any]
    parameters: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, dict[str, TaskScores]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As primitives."""
        models = {}
        for model, tasks in self.tasks.items():
            told = {}
            for name, task in tasks.items():
                asked, there = task.samples or (None, None)
                told[name] = {
                    "version": task.version,
                    "num_fewshot": task.num_fewshot,
                    "samples": asked,
                    "samples_of_the_task": there,
                    "scores": [vars(score) for score in task.scores],
                }
            models[model] = {"parameters": self.parameters[model], "tasks": told}
        return {"circumstances": self.circumstances, "models": models}

    def to_markdown(self) -> str:
        """One row per task, metric and filter, one column per model."""
        told = self.circumstances
        names = list(self.tasks)
        lines = [
            f"# evaluate: {told['device']}, {told['dtype']}, lm-evaluation-harness {told['lm_eval']}",
            "",
            f"| task | version | few-shot | questions | metric | filter | {' | '.join(names)} |",
            f"|---|---|---:|---:|---|---|{'---:|' * len(names)}",
            f"| parameters | | | | | | {' | '.join(f'{self.parameters[name]:,}' for name in names)} |",
        ]
        first = self.tasks[names[0]] if names else {}
        for name, task in first.items():
            asked = "" if task.samples is None else f"{task.samples[0]:,} of {task.samples[1]:,}"
            start = f"{name} | {_text(task.version)} | {_text(task.num_fewshot)} | {asked}"
            for place, score in enumerate(task.scores):
                arrow = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
                cells = " | ".join(str(self.tasks[model][name].scores[place]) for model in names)
                lines.append(f"| {start} | {score.metric}{arrow} | {score.filter} | {cells} |")
        return "\n".join([*lines, ""])

    def save(self, folder: Path) -> None:
        """Writes `report.json` and `report.md`.

        Raises:
            OutputNotWritableError: the disk is full, for instance.
        """
        with errors_told(folder):
            replace_text(folder / "report.json", json.dumps(self.to_dict(), indent=2) + "\n")
            replace_text(folder / "report.md", self.to_markdown())


def _text(value: object) -> str:
    return "" if value is None else str(value)
