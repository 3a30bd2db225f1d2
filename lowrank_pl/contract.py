"""What the data promises to the tasks and strategies, which do not know the data.

A task reads `TargetSpec` from `trainer.datamodule.target`; a strategy that calibrates reads
`trainer.datamodule.calibration_batches(...)`. Both sides import this module and not each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch

TargetKind = Literal["classification", "regression", "token_classification", "masked_lm", "causal_lm"]
MetricName = Literal["accuracy", "f1", "matthews", "pearson", "spearman", "entity_f1", "perplexity"]


LANGUAGE_MODELLING: tuple[TargetKind, ...] = ("masked_lm", "causal_lm")
"""The kinds whose classes are the tokens of the vocabulary: the head comes with the pre-trained model."""


@dataclass(frozen=True)
class TargetSpec:
    """What a data set asks a model to predict, in primitives, because it travels in checkpoints.

    Attributes:
        name: Name of the task for reports, e.g. `"MRPC"`.
        kind: What is predicted.
        label_names: Class names in the order of their ids; BIO tags for token classification; empty for
            regression and for language modelling, whose classes are the tokens.
        metrics: Official metrics of the task. The score is their mean (STS-B: mean of Pearson and Spearman)
            unless `score` names one of them.
        score: The metric that is the score, or `None` for the mean of `metrics`.
    """

    name: str
    kind: TargetKind
    label_names: tuple[str, ...] = ()
    metrics: tuple[MetricName, ...] = ("accuracy",)
    score: MetricName | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-ready primitives (tuples as lists)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TargetSpec:
        """Inverse of `to_dict`."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**values)


class CalibrationBatches(Protocol):
    """Batches of the training split for calibration: finite, repeatable, in a fixed order.

    Attributes:
        num_samples: Samples over all processes together.
        fingerprint: Identifies the samples, what was made of them (tokens, say) and their order: equal means equal
            batches.
    """

    num_samples: int
    fingerprint: str

    def __len__(self) -> int:
        """Number of batches of this process."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """Yields batches on the CPU, as the module's `per_sample_losses` takes them, samples along the first dimension.

        Each sample comes exactly once over all processes. Tasks of this package take model inputs and `labels`.
        """
        ...


@runtime_checkable
class CalibrationSource(Protocol):
    """A datamodule that can hand out calibration batches.

    If it has a `batch_size` (or `hparams.batch_size`), that is asked for unless the user gives another.
    """

    def calibration_batches(
        self,
        batch_size: int,
        max_samples: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> CalibrationBatches:
        """Returns batches of (a seeded random choice of) the training split; see `CalibrationBatches`."""
        ...


@runtime_checkable
class HasTarget(Protocol):
    """A datamodule that says what it asks the model to predict. Known once `setup` has run."""

    @property
    def target(self) -> TargetSpec:
        """The specification of the labels."""
        ...


@runtime_checkable
class ForetellsTarget(Protocol):
    """A datamodule that knows something of its target before it has read anything."""

    @property
    def expected_target(self) -> TargetSpec | None:
        """The target, with empty `label_names` where only the data contain them; `None` if nothing is known yet."""
        ...


@runtime_checkable
class AdoptsTarget(Protocol):
    """A datamodule whose texts may come without the labels that name the classes, as in prediction."""

    @property
    def lacks_target(self) -> bool:
        """Whether only the model knows what the run predicts."""
        ...

    @property
    def knows_target(self) -> bool:
        """Whether there is a `target`: not before `setup`, and not for texts alone, as long as no model has told."""
        ...

    def adopt_target(self, target: TargetSpec) -> None:
        """Takes over what the model predicts. Called before the data are prepared."""
        ...


@runtime_checkable
class HasTokenizer(Protocol):
    """A datamodule that makes tokens of texts."""

    def load_tokenizer(self) -> Any:
        """The tokenizer, before anything is prepared: its length is the number of tokens, `name_or_path` its name."""
        ...


@runtime_checkable
class KnowsItsLength(Protocol):
    """A datamodule that knows how long its samples may become before it has read any."""

    def check_positions(self, config: Any, source: str | None) -> None:
        """Raises `MaxLengthError` where a model of this configuration, from there, has no positions for its samples."""
        ...


@runtime_checkable
class TellsTexts(Protocol):
    """A datamodule that can show what was predicted on. Known once `setup` has run."""

    def predicted_rows(self) -> Sequence[Mapping[str, Any]] | None:
        """The raw rows of the split that `predict` runs on, in its order, JSON-ready; `None` if there are none."""
        ...


@runtime_checkable
class DescribesData(Protocol):
    """A datamodule that describes itself for reports. Known once `setup` has run."""

    def describe(self) -> dict[str, Any]:
        """Returns `fingerprint` and, by split, `samples`; JSON-ready."""
        ...


def choose(size: int, at_most: int | None, seed: int) -> list[int]:
    """Chooses samples at random, without moving the global random state.

    Args:
        size: Samples there are.
        at_most: Samples to choose, or `None` for all.
        seed: Decides the choice.

    Returns:
        Indices in ascending order.
    """
    if at_most is None or at_most >= size:
        return list(range(size))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:at_most].tolist())
