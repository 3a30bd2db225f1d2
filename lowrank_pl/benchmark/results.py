"""What a benchmark found, for a program (JSON) and for a person (Markdown)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lowrank_pl.benchmark.layers import LayerTimes
from lowrank_pl.benchmark.timing import Times


@dataclass(frozen=True)
class Measurement:
    """One model under one engine on one shape of input.

    Attributes:
        model: As the user named it.
        engine: What ran it.
        batch_size: Texts per call.
        length: Tokens per text.
        times: Seconds per call.
        flops: Of the matrix products per call.
        peak_bytes: Memory at its peak; only CUDA reports it.
    """

    model: str
    engine: str
    batch_size: int
    length: int
    times: Times
    flops: int
    peak_bytes: int | None

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Measurement:
        """Inverse of a row of `Results.rows`."""
        times = Times(tuple(float(seconds) for seconds in row["rounds"]))
        size = row["batch_size"], row["length"]
        return cls(row["model"], row["engine"], *size, times, row["flops"], row["peak_bytes"])

    @property
    def cell(self) -> tuple[str, int, int]:
        """What has to be equal for two measurements to be compared."""
        return self.engine, self.batch_size, self.length


@dataclass(frozen=True)
class Results:
    """Everything that one call of `lowrank-pl benchmark` has measured.

    Attributes:
        measurements: The first model of each cell is the one that the others are compared with.
        parameters: By model.
        layers: Of the shapes in the models.
        circumstances: Device, data type, threads, rounds, versions, where the models lie, the command.
        weight_bytes: Memory of parameters and buffers by model, on any device.
        complete: Whether everything that was asked for has been measured.
    """

    measurements: Sequence[Measurement]
    parameters: dict[str, int]
    layers: Sequence[LayerTimes]
    circumstances: dict[str, Any]
    weight_bytes: dict[str, int] = field(default_factory=dict)
    complete: bool = True

    def rows(self) -> list[dict[str, Any]]:
        """One per measurement, with its ratios to the first model of its cell."""
        first: dict[tuple[str, int, int], Measurement] = {}
        rows = []
        for found in self.measurements:
            reference = first.setdefault(found.cell, found)
            speedup, ideal = reference.times.over(found.times), reference.flops / found.flops
            rows.append(
                {
                    "model": found.model,
                    "engine": found.engine,
                    "batch_size": found.batch_size,
                    "length": found.length,
                    "seconds": found.times.median,
                    "spread": found.times.spread,
                    "rounds": list(found.times.rounds),
                    "texts_per_second": found.batch_size / found.times.median,
                    "tokens_per_second": found.batch_size * found.length / found.times.median,
                    "speedup": speedup,
                    "flops": found.flops,
                    "ideal_speedup": ideal,
                    "share_of_ideal": speedup / ideal,
                    "peak_bytes": found.peak_bytes,
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return {
            "complete": self.complete,
            "circumstances": self.circumstances,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "models": self.rows(),
            "layers": [
                {
                    **layer.entry(),
                    "tokens": layer.tokens,
                    "form": layer.form,
                    "break_even_by_parameters": layer.break_even_by_parameters,
                    "break_even_measured": layer.break_even,
                }
                for layer in self.layers
            ],
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Results:
        """Inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is no such dictionary.
        """
        return cls(
            [Measurement.from_row(row) for row in fields["models"]],
            dict(fields["parameters"]),
            [LayerTimes.from_entry(entry) for entry in fields["layers"]],
            dict(fields["circumstances"]),
            dict(fields["weight_bytes"]),
            bool(fields["complete"]),
        )

    def to_markdown(self) -> str:
        """Tables of models and of layers."""
        lines = ["# Benchmark", ""]
        lines += [] if self.complete else ["* incomplete: it was stopped before everything was measured"]
        lines += [f"* {name}: {value}" for name, value in self.circumstances.items() if name != "models"]
        paths = self.circumstances.get("models", {})
        for name, count in self.parameters.items():
            size = self.weight_bytes.get(name, 0) / 2**20
            lines.append(f"* {name}: {count:,} parameters, {size:,.1f} MiB ({paths.get(name, '')})")
        lines += ["", *self._models(), ""]
        if self.layers:
            what = {"low_rank": "two thin factors are", "pivoted": "the pivoted form is"}[self.layers[0].form]
            lines += [f"Ranks up to which {what} faster than the dense layer:", "", *self._layers(), ""]
        return "\n".join(lines)

    def _models(self) -> list[str]:
        names = "engine | batch x length | model | ms | texts/s | speed-up | ideal by FLOPs | share | spread | peak"
        lines = [f"| {names} |", "|---" * 10 + "|"]
        for row in self.rows():
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"
            cells = [row["engine"], f"{row['batch_size']} x {row['length']}", row["model"]]
            cells += [f"{1e3 * row['seconds']:.2f}", f"{row['texts_per_second']:,.1f}", f"{row['speedup']:.2f}"]
            cells += [f"{row['ideal_speedup']:.2f}", f"{row['share_of_ideal']:.2f}", f"{row['spread']:.2f}", peak]
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    def _layers(self) -> list[str]:
        lines = ["| out x in | tokens | dense, ms | by parameters | measured |", "|---|---|---|---|---|"]
        for layer in self.layers:
            shape, measured = layer.shape, layer.break_even
            told = f"above {max(layer.factored)}" if measured is None else f"{measured:.0f}"
            size = f"{shape.out_features} x {shape.in_features}"
            by_parameters = layer.break_even_by_parameters
            lines.append(f"| {size} | {layer.tokens} | {1e3 * layer.dense:.3f} | {by_parameters} | {told} |")
        return lines
