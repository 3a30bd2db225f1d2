"""What a run that reallocates ranks must remember to go on after a stop: primitives and tensors only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lowrank_pl.errors.run import ResumeMismatchError


@dataclass(frozen=True)
class Reallocation:
    """Ranks as they were set once.

    Attributes:
        step: Optimizer steps done.
        scheduled: What the schedule allowed the targeted weights to cost, in the unit of the budget.
        kept: What they cost after it.
        ranks: Per layer.
    """

    step: int
    scheduled: float
    kept: int
    ranks: dict[str, int]


@dataclass
class RankState:
    """Where a run stands.

    Attributes:
        budget: What the targeted weights may cost in the end, in the unit of the strategy's `cost`.
        capacities: Groups per layer at the start.
        total_steps: Length of the run that the schedule was made for.
        step: The last optimizer step that was looked at.
        reached: Whether the budget has been reached: ranks change no more.
        skipped: Steps left out because a gradient was not finite.
        history: Every reallocation.
        cost: Which measure the budget is in; empty in checkpoints of releases before it.
        sensitivity: Class of what groups are scored by; empty in checkpoints of releases before it.
        worthless: Layers on which no loss depended when their ranks were last chosen.
    """

    budget: int = 0
    capacities: dict[str, int] = field(default_factory=dict)
    total_steps: int = 0
    step: int = 0
    reached: bool = False
    skipped: int = 0
    history: list[Reallocation] = field(default_factory=list)
    cost: str = ""
    sensitivity: str = ""
    worthless: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RankState:
        """Inverse of `to_dict`."""
        return cls(**{**fields, "history": [Reallocation(**entry) for entry in fields["history"]]})

    def check_continues(self, other: RankState) -> None:
        """Raises an error for another cost, budget or other layers than those of `other`, the stopped run's state.

        Raises:
            ResumeMismatchError: what differs, in words.
        """
        if other.cost and self.cost != other.cost:
            raise ResumeMismatchError(f"the budget is measured by {other.cost} there, by {self.cost} here")
        if other.sensitivity and self.sensitivity != other.sensitivity:
            raise ResumeMismatchError(f"groups are scored by {other.sensitivity} there, {self.sensitivity} here")
        if not other.sensitivity and self.sensitivity == "KroneckerSensitivity":
            there = "a score that releases before KroneckerSensitivity had, by default FirstOrder"
            raise ResumeMismatchError(f"groups are scored by {there}, by {self.sensitivity} here")
        if self.budget != other.budget:
            raise ResumeMismatchError(
                f"a budget of {other.budget:,} there, of {self.budget:,} here (in the unit of cost)"
            )
        if self.capacities != other.capacities:
            names = sorted(set(self.capacities.items()) ^ set(other.capacities.items()))
            raise ResumeMismatchError(f"other layers or starting ranks, e.g. {names[0][0]!r}")
