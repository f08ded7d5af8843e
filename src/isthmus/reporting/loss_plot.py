"""Owns the picture of training and evaluation loss against steps."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from isthmus.reporting.canvas import INK, MUTED, RULE, SERIES, draw_title, new_figure, quiet_axes, write_png
from isthmus.spec.report import StepRecord

_SMOOTH_FROM_STEPS = 20


def plot_losses(records: Sequence[StepRecord], path: str | os.PathLike[str], *, title: str = "Loss") -> None:
    """Writes the picture (PNG) of the records' losses, mean nats per token. Blocks.

    From 20 steps on the training loss is drawn pale with its running mean over it. Non-finite losses leave gaps. Raises
    ``ValueError`` without records.
    """
    if not records:
        raise ValueError("records is empty, wanted at least one step")
    evaluations = [(record.step, record.evaluation_loss) for record in records if record.evaluation_loss is not None]
    figure = new_figure(8.0, 4.2)
    axes = figure.add_axes((0.09, 0.13, 0.86, 0.72))
    quiet_axes(axes)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    steps, losses = [record.step for record in records], [record.loss for record in records]
    if len(records) >= _SMOOTH_FROM_STEPS:
        axes.plot(steps, losses, color=SERIES[0], linewidth=1.0, alpha=0.35)
        axes.plot(steps, running_mean(losses), color=SERIES[0], linewidth=2.0, label="training (running mean)")
    else:
        axes.plot(steps, losses, color=SERIES[0], linewidth=1.5, marker="o", markersize=3, label="training")
    if evaluations:
        points = zip(*evaluations, strict=True)
        axes.plot(
            *points,
            color=SERIES[1],
            linewidth=1.8,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            label="evaluation",
        )
        last_step, last_loss = evaluations[-1]
        axes.annotate(
            f"{last_loss:.3f}",
            (last_step, last_loss),
            (0, 8),
            textcoords="offset points",
            fontsize=9,
            color=SERIES[1],
            ha="center",
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.03, y=0.12)
    axes.set_xlabel("step", fontsize=9, color=MUTED)
    axes.set_ylabel("loss, nats per token", fontsize=9, color=MUTED)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    draw_title(figure, 0.09, 0.92, title)
    write_png(figure, path)


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of the finite values around each one, a twentieth of all in width and at least 5; NaN where none is finite.

    Centred, since a mean that trails would show a falling loss as higher than it is.
    """
    reach = max(2, len(values) // 40)
    means = []
    for place in range(len(values)):
        side = min(reach, place, len(values) - 1 - place)  # shrinks towards the ends, to stay centred
        near = [value for value in values[place - side : place + side + 1] if math.isfinite(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means
