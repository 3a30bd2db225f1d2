"""From which rank on a factorised layer is slower than a dense one, by measurement. m: outputs, n: inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowrank_pl.allocation.measure import TABLE_VERSION, Parameters
from lowrank_pl.benchmark.timing import timed_in_turn
from lowrank_pl.core import LinearShape
from lowrank_pl.nn import FinalForm, dense_shape, final_form, forms_in
from lowrank_pl.surgery import TargetSelector, tied_heads
from lowrank_pl.surgery.targets import TARGETED

_POINTS = 10
_BEYOND = 1.3  # measured up to this multiple of the arithmetic break-even
_STEP = 8  # ranks that hardware likes


@dataclass(frozen=True)
class Workload:
    """On what layers are timed.

    Attributes:
        tokens: Rows of the input.
        dtype: Of weights and inputs.
        device: Where they lie.
        threads: Of the CPU.
        rounds: See `timed_in_turn`.
        seconds: See `timed_in_turn`.
        form: Of factorised layers.
    """

    tokens: int
    dtype: torch.dtype
    device: str
    threads: int
    rounds: int
    seconds: float
    form: FinalForm = "low_rank"


@dataclass(frozen=True)
class LayerTimes:
    """One shape.

    Attributes:
        shape: Of the weight.
        tokens: Rows of the input.
        dense: Seconds of `nn.Linear`, a whole number of nanoseconds.
        factored: Seconds of a factorised layer by rank, ascending, likewise.
        form: Of the factorised layers.
    """

    shape: LinearShape
    tokens: int
    dense: float
    factored: dict[int, float]
    form: FinalForm = "low_rank"

    @property
    def break_even_by_parameters(self) -> int:
        """The smallest rank at which a factorised layer has no fewer parameters than a dense one."""
        return Parameters().in_form(final_form(self.form)).break_even(self.shape)

    @property
    def break_even(self) -> float | None:
        """The rank up to which the factors are faster, on the straight line between measured ranks.

        0 if they are never faster, `None` if they are at every measured rank.
        """
        faster = 0.0
        points = [(0, 0.0), *self.factored.items()]
        for (low, before), (high, after) in itertools.pairwise(points):
            if after >= self.dense:
                return 0.0 if low == 0 else low + (high - low) * (self.dense - before) / (after - before)
            faster = high
        return None if faster else 0.0

    @classmethod
    def from_entry(cls, entry: dict[str, Any]) -> LayerTimes:
        """From a line of benchmark.json."""
        times = dict(zip(map(int, entry["ranks"]), (t / 1e9 for t in entry["nanoseconds"]), strict=True))
        shape, dense = LinearShape(entry["out"], entry["in"]), entry["dense_nanoseconds"] / 1e9
        return cls(shape, entry["tokens"], dense, times, entry.get("form", "low_rank"))

    def entry(self) -> dict[str, Any]:
        """A line of the table that `Latency` reads."""
        return {
            "out": self.shape.out_features,
            "in": self.shape.in_features,
            "dense_nanoseconds": _nanoseconds(self.dense),
            "ranks": list(self.factored),
            "nanoseconds": [_nanoseconds(seconds) for seconds in self.factored.values()],
        }


def linear_shapes(model: nn.Module, targets: TargetSelector) -> list[LinearShape]:
    """The distinct shapes of a model's targeted layers, factorised or not, in their order."""
    tied = tied_heads(model)
    forms = {name: form for name, form in forms_in(model).items() if name not in tied}
    found = [form.shape for form in forms.values() if form.stands_for is LinearShape]
    names = [name for name, reason in targets.explain(model).items() if reason == TARGETED]
    return list(dict.fromkeys([*found, *(dense_shape(model.get_submodule(name)) for name in names)]))


def ranks_to_measure(shape: LinearShape, form: FinalForm = "low_rank") -> list[int]:
    """About ten ranks from small to beyond the arithmetic break-even, multiples of 8 where there is room for them."""
    break_even = Parameters().in_form(final_form(form)).break_even(shape)
    last = min(shape.full_rank, int(_BEYOND * break_even) + 1)
    step = _STEP if last >= _STEP * _POINTS else 1
    spread = [round(last * (i + 1) / _POINTS / step) * step for i in range(_POINTS)]
    # The lowest and the full rank too, so that a budget in time rests on no extrapolation.
    return sorted({1, *(min(max(rank, 1), shape.full_rank) for rank in spread), shape.full_rank})


def number_of_measurements(shapes: Sequence[LinearShape], rounds: int, form: FinalForm = "low_rank") -> int:
    """How often `measure_layer` calls `done` for all shapes."""
    return sum(rounds * (1 + len(ranks_to_measure(shape, form))) for shape in shapes)


@torch.inference_mode()
def measure_layer(shape: LinearShape, work: Workload, done: Callable[[], object] = lambda: None) -> LayerTimes:
    """Times dense and factorised layers of a shape; `done` is called after every single measurement."""
    kind: Any = {"device": work.device, "dtype": work.dtype}
    x = torch.randn(work.tokens, shape.in_features, **kind)
    layers: dict[str, nn.Module] = {"dense": nn.Linear(shape.in_features, shape.out_features, **kind)}
    form = final_form(work.form)
    for rank in ranks_to_measure(shape, work.form):
        layer = form.build({"rank": rank}, shape, True, torch.device(work.device), work.dtype)
        for parameter in layer.parameters():  # zeros could be faster than numbers
            parameter.normal_(std=0.02)
        layers[str(rank)] = layer
    runs = {name: _call(layer, x) for name, layer in layers.items()}
    times = timed_in_turn(runs, work.rounds, work.seconds, work.threads, done)
    # Rounded as they are written, so that what is derived from them is the same before and after reading.
    medians = {name: _nanoseconds(found.median) / 1e9 for name, found in times.items()}
    dense = medians.pop("dense")
    return LayerTimes(shape, work.tokens, dense, {int(rank): time for rank, time in medians.items()}, work.form)


def _nanoseconds(seconds: float) -> int:
    return max(1, round(seconds * 1e9))


def _call(layer: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> object:
        return layer(x)

    return run


def latency_table(times: Sequence[LayerTimes], work: Workload) -> dict[str, Any]:
    """What `lowrank_pl.allocation.Latency` reads, with the circumstances that it holds for."""
    circumstances = {
        "tokens": work.tokens,
        "dtype": str(work.dtype).removeprefix("torch."),
        "device": work.device,
        "threads": work.threads,
        "form": work.form,
    }
    return {"version": TABLE_VERSION, **circumstances, "shapes": [entry.entry() for entry in times]}
