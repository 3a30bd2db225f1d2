"""Forms of which a rank is all that has to be told."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any

from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.nn.form import LayerForm, Spec, whole_number


class OfRank(LayerForm, ABC):
    """A layer in a form that is final, at one rank `r` for its whole life: `{"rank": r}`."""

    _rank: int

    def spec(self) -> Spec:
        """The rank."""
        return {"rank": self._rank}

    @property
    def rank(self) -> int:
        """The rank `r`."""
        return self._rank

    @classmethod
    def rank_of(cls, spec: Mapping[str, Any], shape: LinearShape) -> int:
        """The rank."""
        del shape
        return whole_number(cls.name, spec, "rank")
