"""The nine tasks of GLUE: their columns, classes and official metrics.

References:
    Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding",
    ICLR 2019, table 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_pl.contract import MetricName, TargetSpec
from lowrank_pl.errors.data import UnknownTaskError

_ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE.

    Attributes:
        name: Its official name, which is also the name of its folder.
        hub: Its name on the Hugging Face hub.
        texts: Columns of the sentences in the official files.
        hub_texts: Columns of the sentences on the hub.
        label: Column of the label in the official files.
        label_names: Class names in the order of the ids on the hub; empty for regression.
        spelled: Whether the official files spell labels as names; else as ids.
        metrics: Official metrics.
        score: The metric that is the score, or `None` for their mean.
        header: Columns of training and validation files without a header line.
    """

    name: str
    hub: str
    texts: tuple[str, ...]
    hub_texts: tuple[str, ...]
    label: str = "label"
    label_names: tuple[str, ...] = ()
    spelled: bool = False
    metrics: tuple[MetricName, ...] = ("accuracy",)
    score: MetricName | None = None
    header: tuple[str, ...] | None = None

    @property
    def target(self) -> TargetSpec:
        """What the task asks a model to predict."""
        kind = "classification" if self.label_names else "regression"
        return TargetSpec(self.name, kind, self.label_names, self.metrics, self.score)  # type: ignore[arg-type]


_SINGLE = ("sentence",)
_PAIR = ("sentence1", "sentence2")
TASKS = (
    GlueTask(
        "CoLA",
        "cola",
        _SINGLE,
        _SINGLE,
        label_names=("unacceptable", "acceptable"),
        metrics=("matthews",),
        header=("source", "label", "star", "sentence"),
    ),
    GlueTask("SST-2", "sst2", _SINGLE, _SINGLE, label_names=("negative", "positive")),
    GlueTask(
        "MRPC",
        "mrpc",
        ("#1 String", "#2 String"),
        _PAIR,
        label="Quality",
        label_names=("not_equivalent", "equivalent"),
        metrics=("f1", "accuracy"),
        score="f1",
    ),
    GlueTask("STS-B", "stsb", _PAIR, _PAIR, label="score", metrics=("pearson", "spearman")),
    GlueTask(
        "QQP",
        "qqp",
        ("question1", "question2"),
        ("question1", "question2"),
        label="is_duplicate",
        label_names=("not_duplicate", "duplicate"),
        metrics=("f1", "accuracy"),
        score="f1",
    ),
    GlueTask(
        "MNLI",
        "mnli",
        _PAIR,
        ("premise", "hypothesis"),
        label="gold_label",
        label_names=("entailment", "neutral", "contradiction"),
        spelled=True,
    ),
    GlueTask("QNLI", "qnli", ("question", "sentence"), ("question", "sentence"), label_names=_ENTAILMENT, spelled=True),
    GlueTask("RTE", "rte", _PAIR, _PAIR, label_names=_ENTAILMENT, spelled=True),
    GlueTask("WNLI", "wnli", _PAIR, _PAIR, label_names=("not_entailment", "entailment")),
)


def find_task(name: str) -> GlueTask:
    """Returns a task by its official name or its name on the hub, in any case.

    Raises:
        UnknownTaskError: there is no such task.
    """
    for task in TASKS:
        if name.lower() in (task.name.lower(), task.hub):
            return task
    raise UnknownTaskError(name, [task.name for task in TASKS])
