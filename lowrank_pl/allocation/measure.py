"""The unit in which a budget is kept: parameters, FLOPs, or time measured on the machine that will serve."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lowrank_pl.core.shapes import LinearShape
from lowrank_pl.errors.numerics import FormCostError, LatencyTableError
from lowrank_pl.nn import LinearForm, LowRankLinear, form_for

TABLE_VERSION = 1


class Measure(ABC):
    """What a linear layer costs, dense and at a rank, in whole units, never less at a higher rank."""

    unit: ClassVar[str]
    counts_lookups: ClassVar[bool] = False
    """Whether it says what a look-up costs, too."""
    knows_every_form: ClassVar[bool] = False
    """Whether `factored` follows `form`."""
    _form: type[LinearForm] = LowRankLinear

    @property
    def form(self) -> type[LinearForm]:
        """The form of factorised layers that `factored` is the cost of."""
        return self._form

    def in_form(self, form: type[LinearForm]) -> Measure:
        """The same measure of layers in another form.

        Raises:
            FormCostError: it does not know what they cost.
        """
        if form is self.form:
            return self
        if not self.knows_every_form:
            raise FormCostError(type(self).__name__, self.form.name, form.name)
        made = copy(self)
        made._form = form
        return made

    def options(self) -> dict[str, Any]:
        """What identifies it in reports, as primitives."""
        told = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"class": type(self).__name__, **told}

    def identity(self) -> str:
        """What two measures that cost everything the same have in common; another for any other."""
        named = {"form": self.form.name} if self.form is not LowRankLinear else {}
        told = ", ".join(f"{name}={value!r}" for name, value in (self.options() | named).items() if name != "class")
        return f"{type(self).__name__}({told})" if told else type(self).__name__

    @abstractmethod
    def dense(self, shape: LinearShape) -> int:
        """Of the dense weight."""

    @abstractmethod
    def factored(self, shape: LinearShape, rank: int) -> int:
        """Of a layer in `form` at a rank.

        Raises:
            RankError: unless `1 <= rank <= min(m, n)`.
        """

    def of(self, shape: LinearShape, rank: int | None) -> int:
        """Of a layer as it is: at a rank, or dense for `None`."""
        return self.dense(shape) if rank is None else self.factored(shape, rank)

    def total_dense(self, shapes: Mapping[str, LinearShape]) -> int:
        """Of all layers when dense: what a `keep_ratio` is a share of."""
        return sum(self.dense(shape) for shape in shapes.values())

    def break_even(self, shape: LinearShape) -> int:
        """The smallest rank at which a factorised layer costs no less than a dense one; full rank + 1 if none does."""
        low, high = 1, shape.full_rank + 1
        while low < high:
            middle = (low + high) // 2
            if self.factored(shape, middle) >= self.dense(shape):
                high = middle
            else:
                low = middle + 1
        return low

    def largest_rank(self, shape: LinearShape, budget: float) -> int:
        """The largest rank that costs no more than a budget; 0 if already the first costs more."""
        low, high = 0, shape.full_rank
        while low < high:
            middle = (low + high + 1) // 2
            if self.factored(shape, middle) <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    def per_rank(self, shape: LinearShape) -> float:
        """What one singular group costs on average over all of them."""
        return self.factored(shape, shape.full_rank) / shape.full_rank


class Parameters(Measure):
    """`m n` dense, `r (m + n)` in two factors, `r (m + n − r)` in the pivoted form."""

    unit = "parameters"
    counts_lookups = True
    knows_every_form = True

    def dense(self, shape: LinearShape) -> int:
        """`m n`."""
        return shape.dense_params

    def factored(self, shape: LinearShape, rank: int) -> int:
        """As the form says."""
        shape.check_rank(rank)
        return form_for(shape, self.form).parameters_of({"rank": rank}, shape)


class Flops(Measure):
    """Floating-point operations per token: `2 m n` dense, `2 r (m + n)` in two factors.

    Where every targeted layer sees every token, as inside an encoder's blocks, this is twice the parameters and the
    ranks are the same; it stands here for those who think in FLOPs.
    """

    unit = "FLOPs per token"
    knows_every_form = True

    def dense(self, shape: LinearShape) -> int:
        """`2 m n`."""
        return 2 * shape.dense_params

    def factored(self, shape: LinearShape, rank: int) -> int:
        """As the form says."""
        shape.check_rank(rank)
        return self.form.flops_of({"rank": rank}, shape)


@dataclass(frozen=True)
class LatencyCurve:
    """Nanoseconds of one shape: dense, and at some ranks in ascending order."""

    dense: int
    ranks: tuple[int, ...]
    nanoseconds: tuple[int, ...]

    def at(self, rank: int) -> int:
        """On the straight line between two measured ranks, and on the last such line beyond them; never falling."""
        ranks, times = self.ranks, self.nanoseconds
        if len(ranks) == 1:
            return times[0]
        right = min(max(bisect_right(ranks, rank), 1), len(ranks) - 1)
        slope = (times[right] - times[right - 1]) / (ranks[right] - ranks[right - 1])
        line = times[right - 1] + slope * (rank - ranks[right - 1])
        # Below the first measured rank a steep line would make the last groups free: no less than their share of it.
        return max(1, round(line), round(times[0] * min(rank / ranks[0], 1)))


class Latency(Measure):
    """Nanoseconds per forward of a layer, from a table that `lowrank-pl benchmark` has measured.

    A measured time that falls with a higher rank is noise, or an artefact of the hardware that would make the higher
    rank the better choice at any budget; it is raised to the highest time before it, so that costs never fall.

    Args:
        table: The file `latency.json` of a benchmark, of the device, data type and number of tokens to serve, and of
            layers in the strategy's `form`.

    Attributes:
        digest: SHA-256 of the times in it, for reports: another table gives other ranks.

    Raises:
        LatencyTableError: the file cannot be read, or is no such table.
    """

    unit = "ns"

    def __init__(self, table: str) -> None:
        self.table = table
        content, self._curves = _read(Path(table).expanduser())
        times = sorted((m, n, c.dense, c.ranks, c.nanoseconds) for (m, n), c in self._curves.items())
        self.digest = hashlib.sha256(repr(times).encode()).hexdigest()
        self._form_name = str(content.get("form", LowRankLinear.name))
        self.circumstances = {name: content.get(name) for name in ("device", "dtype", "threads", "tokens")}

    @property
    def form(self) -> type[LinearForm]:
        """The form that was measured."""
        form = LinearForm.by_name(self._form_name)
        assert issubclass(form, LinearForm)
        return form

    def identity(self) -> str:
        """By the times of the table, wherever its file lies."""
        return f"Latency with a table of digest {self.digest[:12]}"

    def dense(self, shape: LinearShape) -> int:
        """As measured."""
        return self._curve(shape).dense

    def factored(self, shape: LinearShape, rank: int) -> int:
        """As measured, or between two measured ranks."""
        shape.check_rank(rank)
        return self._curve(shape).at(rank)

    def _curve(self, shape: LinearShape) -> LatencyCurve:
        key = (shape.out_features, shape.in_features)
        if key not in self._curves:
            known = ", ".join(f"{m} x {n}" for m, n in self._curves)
            raise LatencyTableError(self.table, f"it has no times for the shape {key[0]} x {key[1]}, only for {known}")
        return self._curves[key]


def _read(path: Path) -> tuple[dict[str, Any], dict[tuple[int, int], LatencyCurve]]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LatencyTableError(str(path), f"it cannot be read ({error})") from error
    if not isinstance(table, dict) or table.get("version") != TABLE_VERSION or not table.get("shapes"):
        raise LatencyTableError(str(path), f"it is no latency table of version {TABLE_VERSION}")
    try:
        curves = {(int(entry["out"]), int(entry["in"])): _curve(entry) for entry in table["shapes"]}
    except (KeyError, TypeError, ValueError) as error:
        raise LatencyTableError(str(path), f"an entry is damaged ({type(error).__name__}: {error})") from error
    if len(curves) < len(table["shapes"]):
        raise LatencyTableError(str(path), "it has two entries for one shape")
    return table, curves


def _curve(entry: dict[str, Any]) -> LatencyCurve:
    ranks, times = [int(r) for r in entry["ranks"]], [int(t) for t in entry["nanoseconds"]]
    if not ranks or len(ranks) != len(times) or ranks != sorted(set(ranks)) or ranks[0] < 1:
        raise ValueError("ranks have to ascend from 1 or more, with one time each")
    if min([int(entry["dense_nanoseconds"]), *times]) < 1:
        raise ValueError("times have to be positive")
    rising: list[int] = []
    for time in times:
        rising.append(max(time, rising[-1] if rising else time))
    return LatencyCurve(int(entry["dense_nanoseconds"]), tuple(ranks), tuple(rising))
