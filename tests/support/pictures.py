"""Whether a picture can be read: nothing is cut off, no legend lies over data."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.legend import Legend
from matplotlib.text import Text


def faults(figure: Any) -> list[str]:
    """Texts that reach over the figure's edge, and legends that reach over the frame of any axes."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    whole = figure.bbox
    found = []
    undrawn = _undrawn(figure)
    for text in figure.findobj(Text):
        box = text.get_window_extent(renderer)
        if text.get_text() and text.get_visible() and text not in undrawn and not _within(box, whole):
            found.append(f"cut off: {text.get_text()!r}")
    for legend in figure.findobj(Legend):
        box = legend.get_window_extent(renderer)
        frames = [axes.get_window_extent(renderer) for axes in figure.axes]
        if any(box.x0 < f.x1 - 1 and f.x0 < box.x1 - 1 and box.y0 < f.y1 - 1 and f.y0 < box.y1 - 1 for f in frames):
            found.append(f"over data: the legend of {[text.get_text() for text in legend.get_texts()]}")
    return found


def _undrawn(figure: Any) -> set[Any]:
    """Labels of ticks outside of the view, which matplotlib keeps and does not draw."""
    found = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        outside = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
        found |= {label for tick in outside for label in (tick.label1, tick.label2)}
    return found


def _within(box: Any, whole: Any) -> bool:
    return bool(box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1)
