"""What a static method makes of one weight: something that can be cut at any rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lowrank_pl.core import Factors, KroneckerGroups


@dataclass(frozen=True)
class Factorised:
    """What a method made of one weight at a rank.

    Attributes:
        factors: Of the rank asked for.
        weighted_error: Relative error in the weighted norm that the method minimises; `None` for plain SVD.
        losses: The curve of the objective, for iterative methods.
        outcome: Why an iterative method stopped.
    """

    factors: Factors
    weighted_error: float | None = None
    losses: tuple[float, ...] = ()
    outcome: str | None = None


class Decomposition(ABC):
    """One weight `[m, n]`, ready to be factorised at a rank that is not known yet."""

    @property
    @abstractmethod
    def energies(self) -> Tensor | None:
        """By how much the loss rises, to second order, without each singular group, `[min(m, n)]`, non-increasing.

        `None` for a method that knows nothing of the loss.
        """

    @abstractmethod
    def at(self, rank: int) -> Factorised:
        """The factors of a rank."""


class ByRank(Decomposition):
    """For methods that start from the weight at every rank; keeps the weight and what was measured until then."""

    def __init__(self, factorise: Callable[[int], Factorised], energies: Callable[[], Tensor] | None = None) -> None:
        self._factorise = factorise
        self._energies = energies

    @property
    def energies(self) -> Tensor | None:
        """Computed when asked for."""
        return None if self._energies is None else self._energies()

    def at(self, rank: int) -> Factorised:
        """Factorises now."""
        return self._factorise(rank)


class ByGroups(Decomposition):
    """For methods whose factors of a rank are the first groups of one decomposition."""

    def __init__(self, groups: KroneckerGroups, of_loss: bool = True) -> None:
        self._groups = groups
        self._of_loss = of_loss

    @property
    def energies(self) -> Tensor | None:
        """Those of the groups, if they are in units of the loss."""
        return self._groups.energies if self._of_loss else None

    def at(self, rank: int) -> Factorised:
        """The first groups."""
        return Factorised(self._groups.factors(rank), self._groups.relative_error(rank))
