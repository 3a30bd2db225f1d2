"""A heat map of ranks: blocks downwards, kinds of matrices across."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_pl.surgery import LayerRecord
from lowrank_pl.surgery.record import DENSE


def grid_position(name: str) -> tuple[str, str]:
    """Splits a layer's name into its block (the first number) and its kind (what follows the block)."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return part, ".".join(parts[index + 1 :]) or parts[index - 1]
    return "-", name


def grid_positions(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The row and column of every layer.

    A row is a block, as in `grid_position`, and tells the stack that it is of where there are several with the same
    kinds of layers, such as an encoder and a decoder.
    """
    positions = {name: grid_position(name) for name in names}
    if len(set(positions.values())) == len(positions):
        return positions
    return {name: (" ".join([*_stack(name), block]), kind) for name, (block, kind) in positions.items()}


def _stack(name: str) -> list[str]:
    """What stands before the block in a layer's name; nothing where it is in none."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return [".".join(parts[: numbers[0]])] if numbers and numbers[0] else []


def rank_heatmap(layers: Sequence[LayerRecord]) -> Any:
    """Draws the share of full rank as colour and the rank as number; a dense layer is marked `dense`.

    Returns:
        A matplotlib figure without a window.
    """
    # The object interface leaves pyplot's global state, and a user's own figures, alone.
    from matplotlib.figure import Figure

    positions = grid_positions([layer.name for layer in layers])
    rows, columns = ([*dict.fromkeys(position[axis] for position in positions.values())] for axis in (0, 1))
    # Wide and high enough for the title and the name of the colours, however few layers there are.
    size = max(4.5, 1.6 + 1.15 * len(columns)), max(2.6, 1.6 + 0.42 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    values = [[float("nan")] * len(columns) for _ in rows]
    for layer in layers:
        block, kind = positions[layer.name]
        row, column = rows.index(block), columns.index(kind)
        share = layer.rank / min(layer.out_features, layer.in_features)
        values[row][column] = share
        text = "dense" if layer.kind == DENSE else str(layer.rank)
        axes.text(column, row, text, ha="center", va="center", color="white" if share < 0.6 else "black", fontsize=8)
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), [kind.replace(".", "\n") for kind in columns], fontsize=7)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylabel("block")
    figure.colorbar(image, label="rank / full rank")
    kept = sum(layer.parameters for layer in layers)
    dense = sum(layer.out_features * layer.in_features for layer in layers)
    axes.set_title(f"{kept:,} of {dense:,} targeted weights ({kept / dense:.2f})", fontsize=9)
    return figure


def save_rank_picture(layers: Sequence[LayerRecord], path: Path) -> None:
    """Writes the heat map as PNG; nothing where no layer is factorised."""
    if any(layer.kind != DENSE for layer in layers):
        rank_heatmap(layers).savefig(path, dpi=130)
