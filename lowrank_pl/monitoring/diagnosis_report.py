"""What a diagnosis of a model's layers looks like to a person and to a program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_pl.core.diagnosis import SVD, Diagnosis
from lowrank_pl.monitoring.rank_picture import grid_positions

_HEADER = ("layer", "rank", "φ", "φ/mean²", "within input", "rank-1 residual", "SVD", "best", "gain", "recommended")
_KRONECKER = ("energy lost", "Global rank")
_MANY = 48
GlobalRanks = Mapping[str, int | None]


def diagnosis_table(
    found: Mapping[str, Diagnosis], ranks: Mapping[str, int], global_ranks: GlobalRanks | None = None
) -> str:
    """A Markdown table: indicators, what SVD and the best method would cost, the gain and the recommendation.

    Args:
        found: By layer.
        ranks: At which methods were compared.
        global_ranks: What `Global` would give, `None` for dense; adds what KroneckerSVD loses at the compared rank.
    """
    header = _HEADER + (() if global_ranks is None else _KRONECKER)
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name, d in found.items():
        cells = [
            name,
            str(ranks[name]),
            f"{d.variance:.3g}",
            f"{d.relative_variance:.2f}",
            f"{d.within_input:.2f}",
            f"{d.rank_one_residual:.3f}",
            f"{d.compared[SVD]:.3g}",
            f"{min(d.compared.values()):.3g}",
            f"{d.gain:.0%}",
            d.recommendation,
        ]
        if global_ranks is not None:
            rank = global_ranks[name]
            lost = "" if d.energy_lost is None else f"{d.energy_lost:.1%}"
            cells += [lost, "dense" if rank is None else str(rank)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def diagnosis_fields(
    found: Mapping[str, Diagnosis], ranks: Mapping[str, int], global_ranks: GlobalRanks | None = None, **extra: Any
) -> dict[str, Any]:
    """JSON-ready; a `global_rank` of `None` is a dense layer."""
    layers = [
        {"name": name, "rank": ranks[name], "gain": d.gain, **vars(d)}
        | ({} if global_ranks is None else {"global_rank": global_ranks[name]})
        for name, d in found.items()
    ]
    return {**extra, "layers": layers}


def diagnosis_figure(found: Mapping[str, Diagnosis]) -> Any:
    """Damage per layer and method, and the indicators below; a matplotlib figure without a window."""
    from matplotlib.figure import Figure

    # Many layers are drawn closer together; few leave room for the legends.
    width = max(8, 2 + (0.28 if len(found) <= _MANY else 0.16) * len(found))
    figure = Figure(figsize=(width, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    places = range(len(found))
    one = next(iter(found.values()))
    methods = list(one.compared)
    for method in methods:
        above.plot(places, [d.compared[method] for d in found.values()], marker=".", label=method)
    above.set_ylabel("rise of the loss, second order" if one.full_rise else "relative weighted error")
    if any(value > 0 for d in found.values() for value in d.full_rise.values()):
        above.set_yscale("log")  # layers differ by orders of magnitude
    _legend_above(above, len(methods))
    indicators = {
        "Var(F) / mean(F)²": [d.relative_variance for d in found.values()],
        "within input": [d.within_input for d in found.values()],
        "rank-1 residual": [d.rank_one_residual for d in found.values()],
    }
    for label, values in indicators.items():
        below.semilogy(places, [max(value, 1e-3) for value in values], marker=".", label=label)
    below.set_ylabel("indicator")
    _legend_above(below, len(indicators))
    labels = [" ".join(position) for position in grid_positions(list(found)).values()]
    below.set_xticks(places, labels, rotation=90, fontsize=7)
    return figure


def _legend_above(axes: Any, columns: int) -> None:
    """A legend over the frame, where it covers no curve."""
    axes.legend(fontsize=7, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3)


def write_diagnosis(
    found: Mapping[str, Diagnosis],
    ranks: Mapping[str, int],
    folder: Path,
    global_ranks: GlobalRanks | None = None,
    **extra: Any,
) -> None:
    """Writes `diagnosis.json`, `diagnosis.md` and `diagnosis.png` into a folder."""
    fields = diagnosis_fields(found, ranks, global_ranks, **extra)
    (folder / "diagnosis.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    (folder / "diagnosis.md").write_text(diagnosis_table(found, ranks, global_ranks) + "\n", encoding="utf-8")
    diagnosis_figure(found).savefig(folder / "diagnosis.png", dpi=130)
