"""Owns the picture of a timeline: one row per lane, colours by kind, waits hatched and tied to what they waited for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from isthmus.reporting.canvas import INK, MUTED, WAIT_EDGE, WAIT_FACE, draw_title, new_figure, write_png
from isthmus.reporting.human import human_bytes, human_s
from isthmus.reporting.timeline_facts import WAIT, Wait, busy_s, clip, find_waits, middle_steps, window
from isthmus.spec.timeline import LANES, Span, Timeline

_LANE_TITLES = {
    "accelerator": "accelerator",
    "cpu_experts": "CPU experts",
    "h2d": "H2D copies",
    "d2h": "D2H copies",
    "optimizer": "optimizer",
}
_KINDS = {
    "dense": ("dense part", "#2f6db3"),
    "attention": ("attention", "#2f6db3"),
    "gate": ("router", "#5b57b5"),
    "expert_forward": ("experts forward", "#2f9e68"),
    "expert_backward": ("experts backward", "#e07b39"),
    "load_expert": ("load expert", "#7fb4e0"),
    "load_dense": ("load dense part", "#a99ad8"),
    "tokens": ("tokens instead of weights", "#f2c037"),
    "gradient": ("gradients", "#cf5c6f"),
    "norm": ("gradient norm", "#b08968"),
    "optimizer": ("optimizer step", "#7d5a44"),
}
_OTHER_COLOURS = ("#4f9d9d", "#9c6b98", "#94a33b", "#5c6770")
_BAR_HEIGHT = 0.74
_POINTS_PER_CHARACTER = 4.7
"""A little more than the mean advance of the labels' type, 7 points high."""
_INCHES_WIDE, _AXES_LEFT, _AXES_WIDTH = 15.0, 0.085, 0.80


def plot_timeline(
    timeline: Timeline, path: str | os.PathLike[str], *, title: str = "Timeline", num_steps: int = 2
) -> None:
    """Writes the picture (PNG) of ``num_steps`` steps in the middle of ``timeline``, or of all of it when no steps are
    marked.

    ``title`` says whose it is (the policy); totals are put below it. Raises ``ValueError`` when there is nothing to
    draw. Blocks while drawing (about a second).
    """
    steps = middle_steps(timeline, num_steps)
    start_s, end_s = window(steps, timeline.spans)
    spans = clip(timeline.spans, start_s, end_s)
    if not spans:
        raise ValueError("timeline has no spans in the steps to show: record with keep_spans=True during some steps")
    # Causes are looked for in whole spans: one cut off at the window's end has not ended there.
    overlapping = [span for span in timeline.spans if span.start_s < end_s and span.end_s > start_s]
    waits = find_waits(overlapping)

    figure = new_figure(_INCHES_WIDE, 5.6)
    axes = figure.add_axes((_AXES_LEFT, 0.175, _AXES_WIDTH, 0.645))
    axes.set_xlim(0.0, (end_s - start_s) * 1e3)
    axes.set_ylim(len(LANES) - 0.45, -0.55)
    _draw_spans(axes, spans, start_s)
    _draw_causes(axes, spans, waits, start_s, end_s)
    _draw_steps(axes, steps, start_s)
    _draw_lane_facts(axes, spans, end_s - start_s)
    _finish(figure, axes, spans)
    _draw_title(figure, spans, waits, steps, title, start_s, end_s)
    write_png(figure, path)


def _draw_spans(axes: Any, spans: Sequence[Span], start_s: float) -> None:
    from matplotlib.collections import PolyCollection

    colours = _colours(spans)
    points_per_ms = _INCHES_WIDE * _AXES_WIDTH * 72 / axes.get_xlim()[1]
    work = [span for span in spans if span.kind != WAIT]
    faces = [colours[span.kind] for span in work]
    # A white edge parts neighbours, but would swallow a narrow box: that one gets an edge of its own colour.
    is_narrow = [(span.end_s - span.start_s) * 1e3 * points_per_ms < 3.0 for span in work]
    edges = [face if narrow else "white" for face, narrow in zip(faces, is_narrow, strict=True)]
    boxes = [_box(span, start_s) for span in work]
    axes.add_collection(PolyCollection(boxes, facecolors=faces, edgecolors=edges, linewidths=0.5, zorder=2))
    boxes = [_box(span, start_s) for span in spans if span.kind == WAIT]
    axes.add_collection(
        PolyCollection(boxes, facecolors=WAIT_FACE, edgecolors=WAIT_EDGE, hatch="////", linewidths=0.5, zorder=3)
    )
    for span in spans:
        text = f"waits for {span.name.rpartition(': ')[2]}" if span.kind == WAIT else span.name
        room = int((span.end_s - span.start_s) * 1e3 * points_per_ms / _POINTS_PER_CHARACTER) - 1
        _draw_label(axes, span, start_s, text, room, colours.get(span.kind, WAIT_FACE))


def _draw_label(axes: Any, span: Span, start_s: float, text: str, room: int, colour: str) -> None:
    """Writes ``text`` inside the span's box where ``room`` characters hold it, broken into lines of words if need
    be."""
    import textwrap

    lines = textwrap.wrap(text, room, break_long_words=False) if room >= 2 else []
    if not lines or len(lines) > (3 if span.kind == WAIT else 4) or max(map(len, lines)) > room:
        return
    is_wait = span.kind == WAIT
    axes.text(
        (span.start_s + span.end_s - 2 * start_s) * 500,
        LANES.index(span.lane) - (0.1 * _BAR_HEIGHT if is_wait else 0.0),  # clear of the strip at the bottom
        "\n".join(lines),
        ha="center",
        va="center",
        fontsize=7,
        linespacing=1.15,
        color=INK if is_wait or _is_light(colour) else "white",
        bbox={"facecolor": WAIT_FACE, "edgecolor": "none", "pad": 1.0} if is_wait else None,
        zorder=4,
        clip_on=True,
    )


def _draw_causes(axes: Any, spans: Sequence[Span], waits: Sequence[Wait], start_s: float, end_s: float) -> None:
    """A strip in each wait in the colour of what was waited for; an arrow from there where the wait is wide enough for
    one."""
    from matplotlib.collections import PolyCollection

    colours = _colours(spans)
    known = [(wait.span, wait.cause) for wait in waits if wait.cause is not None and wait.cause.kind in colours]
    strips = [_box(span, start_s, top=0.80) for span, _ in known]
    faces = [colours[cause.kind] for _, cause in known]
    axes.add_collection(PolyCollection(strips, facecolors=faces, linewidths=0, zorder=3.5))
    for span, cause in known:
        if span.end_s - span.start_s < 0.006 * (end_s - start_s) or span.end_s > end_s:
            continue
        source, target = LANES.index(cause.lane), LANES.index(span.lane)
        towards = 1 if target > source else -1
        axes.annotate(
            "",
            xy=((span.end_s - start_s) * 1e3, target - towards * _BAR_HEIGHT / 2),
            xytext=((cause.end_s - start_s) * 1e3, source + towards * _BAR_HEIGHT / 2),
            arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0},
            zorder=1.5,  # behind the boxes of lanes in between
            annotation_clip=False,
        )


def _draw_steps(axes: Any, steps: Sequence[tuple[int, float, float]], start_s: float) -> None:
    for step, step_start_s, step_end_s in steps:
        for edge_s in (step_start_s, step_end_s):
            axes.axvline((edge_s - start_s) * 1e3, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.text(
            ((step_start_s + step_end_s) / 2 - start_s) * 1e3,
            -0.6,
            f"step {step}  ·  {human_s(step_end_s - step_start_s)}",
            ha="center",
            va="bottom",
            fontsize=9,
            color=INK,
        )


def _draw_lane_facts(axes: Any, spans: Sequence[Span], window_s: float) -> None:
    """At the right of each lane: busy percent, and what it moved or computed."""
    edge = axes.get_yaxis_transform()
    axes.text(1.012, -0.6, "busy", transform=edge, fontsize=9, color=MUTED, va="bottom")
    for row, lane in enumerate(LANES):
        of_lane = [span for span in spans if span.lane == lane]
        busy_share = busy_s(of_lane) / window_s
        axes.text(1.012, row, f"{busy_share:.0%}", transform=edge, fontsize=14, color=INK, va="center", weight="bold")
        num_bytes = sum(span.num_bytes for span in of_lane)
        if num_bytes:
            facts = f"{human_bytes(num_bytes)}\n{human_bytes(num_bytes / window_s)}/s"
        else:
            waiting_s = sum(span.end_s - span.start_s for span in of_lane if span.kind == WAIT)
            facts = f"waits\n{waiting_s / window_s:.0%}" if waiting_s else ""
        axes.text(1.062, row, facts, transform=edge, fontsize=8, color=MUTED, va="center")


def _finish(figure: Any, axes: Any, spans: Sequence[Span]) -> None:
    from matplotlib.patches import Patch

    axes.set_yticks(range(len(LANES)), [_LANE_TITLES.get(lane, lane) for lane in LANES], fontsize=11, color=INK)
    axes.tick_params(length=0, colors=MUTED, labelsize=9)
    axes.tick_params(axis="y", labelsize=11, labelcolor=INK)
    for row in range(len(LANES)):
        axes.axhspan(row - _BAR_HEIGHT / 2, row + _BAR_HEIGHT / 2, color="#f8f9fa", zorder=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel("milliseconds", fontsize=9, color=MUTED)
    handles = [Patch(color=colour, label=_title_of(kind)) for kind, colour in _colours(spans).items()]
    if any(span.kind == WAIT for span in spans):
        handles.append(
            Patch(facecolor=WAIT_FACE, edgecolor=WAIT_EDGE, hatch="////", label="waits (strip, arrow: for what)")
        )
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(_AXES_LEFT - 0.004, -0.01),
        ncols=-(-len(handles) // 2),  # two rows: one runs out of the picture
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        handleheight=0.9,
        handletextpad=0.5,
        columnspacing=1.4,
        borderaxespad=0.0,
    )


def _draw_title(
    figure: Any,
    spans: Sequence[Span],
    waits: Sequence[Wait],
    steps: Sequence[tuple[int, float, float]],
    title: str,
    start_s: float,
    end_s: float,
) -> None:
    moved = {lane: human_bytes(sum(span.num_bytes for span in spans if span.lane == lane)) for lane in ("h2d", "d2h")}
    what = f"{len(steps)} step{'s' if len(steps) > 1 else ''} in " if steps else ""
    totals = f"{what}{human_s(end_s - start_s)}  ·  {moved['h2d']} to the accelerator, {moved['d2h']} to the host"
    draw_title(figure, _AXES_LEFT, 0.945, title, fontsize=15)
    figure.text(_AXES_LEFT, 0.898, f"{totals}{_waited_for(waits, start_s, end_s)}", fontsize=10, color=MUTED)


def _waited_for(waits: Sequence[Wait], start_s: float, end_s: float) -> str:
    """``; the accelerator waited 31 %: 22 % for CPU experts, 9 % for H2D copies``, or nothing if it never waited."""
    shares: dict[str, float] = {}
    for wait in waits:
        if wait.span.lane == "accelerator":
            cause = _LANE_TITLES.get(wait.cause.lane, wait.cause.lane) if wait.cause else "something else"
            inside_s = min(wait.span.end_s, end_s) - max(wait.span.start_s, start_s)
            shares[cause] = shares.get(cause, 0.0) + inside_s / (end_s - start_s)
    if not shares:
        return ""
    parts = sorted(shares.items(), key=lambda item: -item[1])
    said = ", ".join(f"{share:.0%} for {cause}" for cause, share in parts)
    return f"  ·  the accelerator waited {sum(shares.values()):.0%}: {said}"


def _colours(spans: Sequence[Span]) -> dict[str, str]:
    """Kind to colour for the kinds of ``spans``, in the order of the legend; unknown kinds come last, sorted."""
    seen = {span.kind for span in spans} - {WAIT}
    known = {kind: colour for kind, (_, colour) in _KINDS.items() if kind in seen}
    unknown = sorted(seen - set(known))
    return known | {kind: _OTHER_COLOURS[i % len(_OTHER_COLOURS)] for i, kind in enumerate(unknown)}


def _title_of(kind: str) -> str:
    return _KINDS[kind][0] if kind in _KINDS else kind.replace("_", " ") or "other"


def _box(span: Span, start_s: float, top: float = 0.0) -> list[tuple[float, float]]:
    """The corners of the span's box in milliseconds and rows, from ``top`` (a fraction of its height) down."""
    row = LANES.index(span.lane)
    left, right = (span.start_s - start_s) * 1e3, (span.end_s - start_s) * 1e3
    upper, lower = row + (top - 0.5) * _BAR_HEIGHT, row + 0.5 * _BAR_HEIGHT
    return [(left, upper), (right, upper), (right, lower), (left, lower)]


def _is_light(colour: str) -> bool:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue > 150
