"""Owns the pictures of one request's latency: against bandwidth, or way beside way where there is one bandwidth."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.reporting.canvas import INK, MUTED, RULE, SERIES, draw_title, new_figure, quiet_axes, write_png
from isthmus.spec.report import BenchInferRow

Cells = Mapping[float | None, Sequence[BenchInferRow]]
"""Rows by bandwidth of every link in bits per second; None: whatever the links are."""


def are_simulated(rows: Sequence[BenchInferRow]) -> bool:
    """Whether these come from ``isthmus simulate infer``: one latency each, and nothing was measured."""
    return bool(rows) and all(row.transport == "simulated" for row in rows)


def way_of(row: BenchInferRow) -> str:
    """``tensor, int8 wire``, or ``single`` where nothing is sent; the dtype too where it is not FP32. One device with a
    decoupled model is ``single, 4 sub-blocks``; ``block`` is always one."""
    parts = [row.strategy]
    if row.num_sub_blocks > 1 and row.strategy != "block":
        parts.append(f"{row.num_sub_blocks} sub-blocks")
    if row.num_devices > 1:
        parts.append(f"{row.codec} wire")
    if row.dtype != "fp32":
        parts.append(f"{row.dtype} weights")
    return ", ".join(parts)


def plot_latency(cells: Cells, path: str | os.PathLike[str], *, title: str = "One request") -> None:
    """Writes the picture (PNG) of the rows of ``isthmus bench infer``. Blocks.

    Over several bandwidths a line per strategy, codec and dtype, measured with its p10–p90 band and predicted in thin
    dashes; the least bound of those ways; and the best single device, which has no link, with the model that is not
    decoupled where that answered too. With one bandwidth a bar per way instead. What was simulated is one line or bar,
    without a prediction. Of rows with the same way the fastest is drawn. Raises ``ValueError`` without rows.
    """
    fastest = {bandwidth: _fastest(rows) for bandwidth, rows in cells.items() if rows}
    if not fastest:
        raise ValueError("rows is empty, wanted the rows of a bench report: run isthmus bench infer --report first")
    if len(fastest) > 1:
        if None in fastest:
            raise ValueError("bandwidth: got None among several, wanted bits per second for each")
        figure = _lines({bandwidth: fastest[bandwidth] for bandwidth in sorted(b for b in fastest if b is not None)})
    else:
        [ways] = fastest.values()
        figure = _bars(ways)
    draw_title(figure, 0.09, 0.92, title)
    write_png(figure, path)


def _fastest(rows: Sequence[BenchInferRow]) -> dict[str, BenchInferRow]:
    """By way, one device last."""
    ways: dict[str, BenchInferRow] = {}
    for row in sorted(rows, key=lambda row: (row.num_devices == 1, way_of(row), row.latency_s.median)):
        ways.setdefault(way_of(row), row)
    return ways


def _lines(cells: dict[float, dict[str, BenchInferRow]]) -> Any:
    figure = new_figure(9.2, 4.6)
    axes = figure.add_axes((0.09, 0.13, 0.61, 0.72))
    quiet_axes(axes)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    together = {bandwidth: [row for row in ways.values() if row.num_devices > 1] for bandwidth, ways in cells.items()}
    names = list(dict.fromkeys(way_of(row) for rows in together.values() for row in rows))
    for number, name in enumerate(names):
        points = [(bandwidth / 1e6, ways[name]) for bandwidth, ways in cells.items() if name in ways]
        _draw_way(axes, name, points, SERIES[number % len(SERIES)])
    is_simulated = are_simulated([row for ways in cells.values() for row in ways.values()])
    if not is_simulated:
        axes.plot([], [], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), label="predicted")
    bounds = [(bandwidth / 1e6, min(row.bound_s for row in rows)) for bandwidth, rows in together.items() if rows]
    if bounds:
        axes.plot(*zip(*bounds, strict=True), color=INK, linewidth=1.2, linestyle=":", label="bound, least of these")
    _draw_alone(axes, [[row for row in ways.values() if row.num_devices == 1] for ways in cells.values()])
    axes.set_xscale("log")
    axes.set_xticks([bandwidth / 1e6 for bandwidth in cells], [f"{bandwidth / 1e6:g}" for bandwidth in cells])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.05)
    axes.set_xlabel("bandwidth of each link, Mbit/s", fontsize=9, color=MUTED)
    axes.set_ylabel(_seconds_label(is_simulated), fontsize=9, color=MUTED)
    axes.legend(
        frameon=False, fontsize=9, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.02, 1.02), borderaxespad=0
    )
    return figure


def _seconds_label(is_simulated: bool) -> str:
    return f"seconds per request ({'simulated' if is_simulated else 'median, p10–p90'})"


def _draw_alone(axes: Any, cells: Sequence[Sequence[BenchInferRow]]) -> None:
    """Across all bandwidths, the best single device's median over ``cells``, which have the rows of one device each."""
    models = {row.num_sub_blocks for rows in cells for row in rows}
    best_s = [
        min(own_s)
        for rows in cells
        if (own_s := [row.latency_s.median for row in rows if row.num_sub_blocks == min(models)])
    ]
    if best_s:
        label = "best single device" if len(models) == 1 else "best single device, not decoupled"
        axes.axhline(statistics.median(best_s), color=MUTED, linewidth=1.6, label=label)


def _draw_way(axes: Any, name: str, points: Sequence[tuple[float, BenchInferRow]], colour: str) -> None:
    places = [mbit_per_s for mbit_per_s, _ in points]
    spreads = [row.latency_s for _, row in points]
    axes.fill_between(
        places, [each.p10 for each in spreads], [each.p90 for each in spreads], color=colour, alpha=0.13, linewidth=0
    )
    predicted_s = [row.predicted_latency_s for _, row in points]
    axes.plot(places, predicted_s, color=colour, linewidth=1.0, linestyle=(0, (4, 3)), zorder=3)
    medians = [each.median for each in spreads]
    axes.plot(places, medians, color=colour, linewidth=2, marker="o", markersize=5, label=name, zorder=4)


def _bars(ways: dict[str, BenchInferRow]) -> Any:
    """Bars along the left, so that names have room: measured, a stroke for the prediction, a dark one for the bound."""
    figure = new_figure(8.0, 1.6 + 0.42 * len(ways))
    height_in = figure.get_size_inches()[1]
    is_simulated = are_simulated(list(ways.values()))
    axes = figure.add_axes((0.29, 0.6 / height_in, 0.67, 1 - 1.2 / height_in))
    quiet_axes(axes)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    for place, row in enumerate(ways.values()):
        spread = row.latency_s
        error = [[max(0.0, spread.median - spread.p10)], [max(0.0, spread.p90 - spread.median)]]
        axes.barh(
            place,
            spread.median,
            height=0.62,
            color=SERIES[0] if row.num_devices > 1 else MUTED,
            xerr=error,
            ecolor=INK,
            error_kw={"linewidth": 1},
        )
        first = place == 0
        ends = (place - 0.38, place + 0.38)
        if not is_simulated:
            axes.plot(
                [row.predicted_latency_s] * 2, ends, color=SERIES[1], linewidth=2, label="predicted" if first else None
            )
        axes.plot([row.bound_s] * 2, ends, color=INK, linewidth=2, linestyle=":", label="bound" if first else None)
    axes.set_yticks(range(len(ways)), list(ways))
    axes.tick_params(axis="y", labelcolor=INK)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(_seconds_label(is_simulated), fontsize=9, color=MUTED, loc="left")
    figure.legend(
        *axes.get_legend_handles_labels(),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(0.97, 0.1 / height_in),
    )
    return figure
