"""The picture of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowrank_pl.benchmark.results import Results

_WIDEST = 24.0
"""Inches; panels that would take more together stand below each other."""


def benchmark_figure(results: Results) -> Any:
    """Speed-up of every model but the first, and time of layers over their rank.

    Returns:
        A matplotlib figure without a window.
    """
    from matplotlib.figure import Figure

    engines = list(dict.fromkeys(found.engine for found in results.measurements))
    panels = len(engines) + bool(results.layers)
    models = list(dict.fromkeys(found.model for found in results.measurements))
    cells = {(found.batch_size, found.length) for found in results.measurements}
    # A bar is as wide as the number above it.
    width = max(6.5, 1.5 + 0.25 * len(cells) * max(1, len(models) - 1))
    stacked = width * panels > _WIDEST
    figure = Figure(figsize=(width, 4.4 * panels) if stacked else (width * panels, 4.8), layout="constrained")
    axes = figure.subplots(*((panels, 1) if stacked else (1, panels)), squeeze=False).flatten()
    for axis, engine in zip(axes, engines, strict=False):
        _models(axis, [row for row in results.rows() if row["engine"] == engine])
        axis.set_title(engine, fontsize=9)
    if engines:
        handles, names = axes[0].get_legend_handles_labels()
        title = f"models, against {models[0]}"
        figure.legend(handles, names, title=title, fontsize=7, title_fontsize=7, loc="outside upper left")
    if results.layers:
        _layers(axes[-1], results)
    return figure


def _models(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    cells = list(dict.fromkeys((row["batch_size"], row["length"]) for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    others = models[1:] or models
    width = 0.8 / len(others)
    for index, model in enumerate(others):
        found = {(row["batch_size"], row["length"]): row for row in rows if row["model"] == model}
        places = [position + index * width for position in range(len(cells))]
        bars = axes.bar(places, [found[cell]["speedup"] for cell in cells], width * 0.9, label=model)
        axes.bar_label(bars, fmt="%.2f", fontsize=6)
        ideal = [found[cell]["ideal_speedup"] for cell in cells]
        axes.plot(places, ideal, "k_", markersize=10, label="ideal by FLOPs" if index == 0 else None)
    axes.axhline(1, color="grey", linewidth=0.8)
    middles = [position + 0.4 - width / 2 for position in range(len(cells))]
    axes.set_xticks(middles, [f"{batch} x {length}" for batch, length in cells], fontsize=7)
    axes.set_xlabel("batch x length")
    axes.set_ylabel("speed-up")
    axes.margins(y=0.1)


def _layers(axes: Any, results: Results) -> None:
    for layer in results.layers:
        shape = layer.shape
        ratio = [seconds / layer.dense for seconds in layer.factored.values()]
        [line] = axes.plot(list(layer.factored), ratio, ".-", label=f"{shape.out_features} x {shape.in_features}")
        axes.axvline(layer.break_even_by_parameters, color=line.get_color(), linestyle=":", linewidth=0.8)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xlabel(f"rank at {results.layers[0].tokens} tokens (dotted: break-even by parameters)")
    axes.set_ylabel("time factorised / time of the dense")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3)
