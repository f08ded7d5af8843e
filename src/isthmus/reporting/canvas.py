"""Owns how pictures look and how they are written: colours, type, and PNG files made without pyplot's global state.

matplotlib is imported inside the functions of this package, so that importing ``reporting`` stays cheap.
"""

from __future__ import annotations

import io
import os
from typing import Any

from isthmus.spec.files import atomic_write

INK = "#1f2933"
MUTED = "#6b7785"
RULE = "#d5dbe1"
WAIT_FACE, WAIT_EDGE = "#f1f3f5", "#b4bcc5"
SERIES = ("#2563a8", "#d9480f", "#2b8a3e", "#8e44ad", "#b8860b", "#0b7285", "#c2255c", "#5c6770")
"""Colours for lines and bars, in order; distinguishable with red-green weakness by their lightness."""

_DOTS_PER_INCH = 144


def new_figure(width_in: float, height_in: float) -> Any:
    """An empty matplotlib ``Figure`` of that size in inches, drawn by Agg, belonging to nobody else."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=_DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def quiet_axes(axes: Any) -> None:
    """Takes away what carries no information: the frame's top and right, ticks, loud colours."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(RULE)
    axes.tick_params(length=0, labelsize=9, colors=MUTED)
    axes.set_axisbelow(True)


def draw_title(figure: Any, left: float, bottom: float, title: str, *, fontsize: float = 13) -> None:
    """Begins at those shares of the figure; smaller where it would not end inside."""
    text = figure.text(left, bottom, title, fontsize=fontsize, weight="bold", color=INK)
    room, needed = (0.98 - left) * figure.bbox.width, text.get_window_extent().width
    if needed > room:
        text.set_fontsize(fontsize * room / needed)


def write_png(figure: Any, path: str | os.PathLike[str]) -> None:
    """Draws ``figure`` and writes it in one step. Blocks; ``OSError`` leaves the previous file whole."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_DOTS_PER_INCH)
    atomic_write(path, png.getvalue())
