"""Owns the picture of several devices' timelines, one below the other: a colour per stage, as in APTMoE's figures; and
how timelines are written, of one device or several."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from isthmus.reporting.canvas import INK, MUTED, SERIES, WAIT_EDGE, WAIT_FACE, draw_title, new_figure, write_png
from isthmus.reporting.chrome_trace import write_chrome_trace
from isthmus.reporting.human import human_s
from isthmus.reporting.timeline_facts import WAIT, busy_s, clip, middle_steps, window
from isthmus.reporting.timeline_plot import plot_timeline
from isthmus.spec.plan import Stage
from isthmus.spec.timeline import LANES, Span, Timeline

_LANE_TITLES = {"accelerator": "computes", "cpu_experts": "CPU experts", "h2d": "loads", "d2h": "unloads"}
_LANE_HEIGHTS = {"accelerator": 1.0}
_OTHER_LANE_HEIGHT, _GAP = 0.55, 0.35
_NO_STAGE = "#9aa5b1"
_BACKWARD_TINT = 0.45
"""Of white in the colour of backward work."""
_MOST_IN_LEGEND, _LEGEND_COLUMNS = 16, 7
_INCHES_WIDE, _LEFT, _WIDTH = 15.0, 0.115, 0.835


@dataclass(frozen=True, kw_only=True)
class _Row:
    device: int
    lane: str
    top: float
    bottom: float

    @property
    def middle(self) -> float:
        return (self.top + self.bottom) / 2


def plot_devices(
    devices: Sequence[Timeline],
    stages: Sequence[Stage],
    path: str | os.PathLike[str],
    *,
    title: str,
    num_steps: int = 1,
) -> None:
    """Writes the picture (PNG) of ``num_steps`` steps in the middle of ``devices``' timelines, on the clock of the
    first, or of all of them when no steps are marked.

    A span's stage is that of the layer in its name; backward work is lighter; waits are hatched. ``title`` says whose
    it is. Raises ``ValueError`` when there is nothing to draw. Blocks while drawing (a second or two).
    """
    steps = middle_steps(devices[0], num_steps)
    spans = [span for timeline in devices for span in timeline.spans]
    if not spans:
        raise ValueError("devices: no timeline has spans: record with keep_spans=True during some steps")
    start_s, end_s = window(steps, spans)
    shown = [clip(timeline.spans, start_s, end_s) for timeline in devices]
    lanes = [lane for lane in LANES if any(span.lane == lane for spans in shown for span in spans)]
    rows = list(_rows(len(devices), lanes))
    below_in = 0.55 + 0.2 * -(-_num_handles(stages) // _LEGEND_COLUMNS)
    height_in = below_in + 0.65 + 0.36 * rows[-1].bottom
    figure = new_figure(_INCHES_WIDE, height_in)
    axes = figure.add_axes((_LEFT, below_in / height_in, _WIDTH, 1 - (below_in + 0.65) / height_in))
    axes.set_xlim(0.0, (end_s - start_s) * 1e3)
    axes.set_ylim(rows[-1].bottom + 0.05, -0.05)
    stage_of = {
        layer: number for number, stage in enumerate(stages) for layer in range(stage.first_layer, stage.last_layer + 1)
    }
    for row in rows:
        of_lane = [span for span in shown[row.device] if span.lane == row.lane]
        _draw_row(axes, row, of_lane, stage_of, start_s)
        if row.lane == "accelerator":
            busy = busy_s(of_lane) / (end_s - start_s)
            edge = axes.get_yaxis_transform()
            axes.text(1.008, row.middle, f"{busy:.0%}", transform=edge, fontsize=11, color=INK, va="center")
            axes.text(-0.115, row.middle, f"device {row.device}", transform=edge, fontsize=10, color=INK, va="center")
    _finish(figure, axes, rows, stages)
    what = f"{len(steps)} step{'s' if len(steps) > 1 else ''} in " if steps else ""
    draw_title(figure, _LEFT, 1 - 0.33 / height_in, title, fontsize=14)
    said = f"{what}{human_s(end_s - start_s)}  ·  {len(stages)} stages; right: share of the time in which it computes"
    figure.text(_LEFT, 1 - 0.56 / height_in, said, fontsize=10, color=MUTED)
    write_png(figure, path)


def write_timelines(
    devices: Sequence[Timeline], stages: Sequence[Stage], path: str | os.PathLike[str], *, title: str
) -> None:
    """Writes a Chrome trace of all to ``path``, and beside it (``.png``) their picture, or one device's own."""
    write_chrome_trace(devices, path)
    picture = Path(path).with_suffix(".png")
    if len(devices) == 1:
        plot_timeline(devices[0], picture, title=title)
    else:
        plot_devices(devices, stages, picture, title=title)


def _rows(num_devices: int, lanes: Sequence[str]) -> Iterator[_Row]:
    top = 0.0
    for device in range(num_devices):
        for lane in lanes:
            bottom = top + _LANE_HEIGHTS.get(lane, _OTHER_LANE_HEIGHT)
            yield _Row(device=device, lane=lane, top=top, bottom=bottom - 0.08)
            top = bottom
        top += _GAP


def _draw_row(axes: Any, row: _Row, spans: Sequence[Span], stage_of: dict[int, int], start_s: float) -> None:
    from matplotlib.collections import PolyCollection

    axes.axhspan(row.top, row.bottom, color="#f8f9fa", zorder=0)
    work = [span for span in spans if span.kind != WAIT]
    faces = [_colour(stage_of.get(-1 if span.layer is None else span.layer), _is_backward(span)) for span in work]
    boxes = [_box(span, row, start_s) for span in work]
    axes.add_collection(PolyCollection(boxes, facecolors=faces, linewidths=0, zorder=2))
    boxes = [_box(span, row, start_s) for span in spans if span.kind == WAIT]
    waits = {"facecolors": WAIT_FACE, "edgecolors": WAIT_EDGE, "hatch": "////", "linewidths": 0.3}
    axes.add_collection(PolyCollection(boxes, **waits, zorder=3))
    if row.lane == "accelerator":
        _draw_stage_numbers(axes, row, [span for span in work if span.layer in stage_of], stage_of, start_s)


def _draw_stage_numbers(axes: Any, row: _Row, spans: Sequence[Span], stage_of: dict[int, int], start_s: float) -> None:
    """Once while a device stays with a stage, where there is room."""
    room_ms = 0.006 * axes.get_xlim()[1]

    for stage, group in groupby(spans, lambda span: stage_of[span.layer or 0]):
        widest = max(group, key=lambda span: span.end_s - span.start_s)
        first_ms, last_ms = ((at - start_s) * 1e3 for at in (widest.start_s, widest.end_s))
        if last_ms - first_ms >= room_ms:
            colour = INK if _is_backward(widest) else "white"
            style = {"ha": "center", "va": "center", "fontsize": 9, "weight": "bold", "color": colour, "zorder": 4}
            axes.text((first_ms + last_ms) / 2, row.middle, str(stage), **style)


def _is_backward(span: Span) -> bool:
    return "backward" in span.kind or "backward" in span.name or span.kind == "gradient"


def _colour(stage: int | None, is_backward: bool) -> str:
    # Not the same again for stages that the same device has, whose number is often a divisor of that of the colours.
    colour = _NO_STAGE if stage is None else SERIES[(stage + stage // len(SERIES)) % len(SERIES)]
    if not is_backward:
        return colour
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(value + (255 - value) * _BACKWARD_TINT):02x}" for value in channels)


def _box(span: Span, row: _Row, start_s: float) -> list[tuple[float, float]]:
    left, right = (span.start_s - start_s) * 1e3, (span.end_s - start_s) * 1e3
    return [(left, row.top), (right, row.top), (right, row.bottom), (left, row.bottom)]


def _finish(figure: Any, axes: Any, rows: Sequence[_Row], stages: Sequence[Stage]) -> None:
    from matplotlib.patches import Patch

    axes.set_yticks([row.middle for row in rows], [_LANE_TITLES.get(row.lane, row.lane) for row in rows])
    axes.tick_params(length=0, colors=MUTED, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel("milliseconds", fontsize=9, color=MUTED)
    handles = [
        Patch(color=_colour(number, is_backward=False), label=f"stage {number} ({_layers(stage)})")
        for number, stage in enumerate(stages[:_MOST_IN_LEGEND])
    ]
    handles.append(Patch(color=_NO_STAGE, label="of no layer"))
    handles.append(Patch(color=_colour(None, is_backward=True), label="lighter: backward"))
    handles.append(Patch(facecolor=WAIT_FACE, edgecolor=WAIT_EDGE, hatch="////", label="waits"))
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(_LEFT - 0.004, -0.002),
        ncols=_LEGEND_COLUMNS,
        frameon=False,
        fontsize=8,
        handlelength=1.2,
        columnspacing=1.2,
        borderaxespad=0.0,
    )


def _num_handles(stages: Sequence[Stage]) -> int:
    return min(len(stages), _MOST_IN_LEGEND) + 3


def _layers(stage: Stage) -> str:
    if stage.first_layer == stage.last_layer:
        return f"layer {stage.first_layer}"
    return f"layers {stage.first_layer}–{stage.last_layer}"
