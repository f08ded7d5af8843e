"""Owns the picture of how a decoupled copy comes closer to its original while it is distilled."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from isthmus.reporting.canvas import INK, MUTED, RULE, SERIES, draw_title, new_figure, quiet_axes, write_png
from isthmus.spec.report import FidelityPoint


def plot_fidelity(curve: Sequence[FidelityPoint], path: str | os.PathLike[str], *, title: str = "Fidelity") -> None:
    """Writes the picture (PNG) of a curve against minutes of training: cosine and Spearman of an encoder, perplexity by
    the original's of a decoder. Blocks. Raises ``ValueError`` without points."""
    if not curve:
        raise ValueError("curve is empty, wanted at least one point")
    figure = new_figure(8.0, 4.2)
    axes = figure.add_axes((0.09, 0.13, 0.84, 0.72))
    quiet_axes(axes)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    minutes = [point.minutes for point in curve]
    series = _series(curve)
    highest = max(values[-1] for values in series.values())
    for (name, values), color in zip(series.items(), SERIES, strict=False):
        axes.plot(
            minutes, values, color=color, linewidth=1.8, marker="o", markersize=5, markeredgecolor="white", label=name
        )
        axes.annotate(
            f"{values[-1]:.3f}",
            (minutes[-1], values[-1]),
            (6, 1 if values[-1] == highest else -9),
            textcoords="offset points",
            fontsize=9,
            color=color,
        )
    axes.margins(x=0.03, y=0.1)
    axes.set_xlabel("minutes of distillation", fontsize=9, color=MUTED)
    axes.set_ylabel("copy beside original, on text held out", fontsize=9, color=MUTED)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")
    draw_title(figure, 0.09, 0.92, title)
    write_png(figure, path)


def _series(curve: Sequence[FidelityPoint]) -> dict[str, list[float]]:
    if curve[0].original_loss is not None:
        return {"perplexity ÷ original's": [math.exp(point.loss - (point.original_loss or 0.0)) for point in curve]}
    return {
        "cosine": [point.cosine or 0.0 for point in curve],
        "Spearman of pairs' similarities": [point.spearman or 0.0 for point in curve],
    }
