"""Owns the Chrome trace form of a timeline: JSON that Perfetto and ``chrome://tracing`` open, and that reads back
whole.

One process per device, in it one thread per lane in the order of ``LANES``, and a first thread ``steps`` with one slice
per training step. Times are microseconds with three decimals, so a timeline survives the round trip to the nanosecond.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isthmus.spec.files import atomic_write
from isthmus.spec.timeline import LANES, Span, Timeline

# Perfetto puts the thread whose number is its process's first, and takes thread 0 for the kernel's idle task.
_FIRST_PROCESS = 1
_STEPS_THREAD = 1
_LANE_TITLES = {
    "accelerator": "accelerator",
    "cpu_experts": "CPU experts",
    "h2d": "copies to the accelerator (H2D)",
    "d2h": "copies to the host (D2H)",
    "optimizer": "optimizer",
}


def chrome_trace(*devices: Timeline) -> str:
    """The trace as JSON text, one event per line. ``args`` hold ``kind``, ``num_bytes`` and ``num_tokens`` where they
    say something.

    Raises ``ValueError`` for a span in an unknown lane.
    """
    events = []
    for device, timeline in enumerate(devices):
        title = "isthmus" if len(devices) == 1 else f"device {device}"
        events += _events(timeline, _FIRST_PROCESS + device, title)
    lines = ",\n".join(json.dumps(event, ensure_ascii=False) for event in events)
    header = f'"displayTimeUnit": "ms",\n"otherData": {{"isthmus_schema_version": {devices[0].schema_version}}}'
    return f'{{{header},\n"traceEvents": [\n{lines}\n]}}\n'


def _events(timeline: Timeline, process: int, title: str) -> list[dict[str, Any]]:
    steps = (process, _STEPS_THREAD)
    events = [_metadata("process_name", steps, name=title), *_thread_metadata(steps, "steps")]
    for lane in LANES:
        events += _thread_metadata((process, _lane_thread(lane)), _LANE_TITLES.get(lane, lane))
    for step, start_s, end_s in timeline.steps:
        events.append(_slice(f"step {step}", "step", steps, start_s, end_s, {"step": step}))
    for span in timeline.spans:
        args = {"kind": span.kind, "num_bytes": span.num_bytes, "num_tokens": span.num_tokens}
        said = {key: value for key, value in args.items() if value}
        thread = (process, _lane_thread(span.lane))
        events.append(_slice(span.name, span.kind or "span", thread, span.start_s, span.end_s, said))
    return events


def write_chrome_trace(devices: Timeline | Sequence[Timeline], path: str | os.PathLike[str]) -> None:
    """Writes ``chrome_trace`` to ``path`` in one step; the previous file stays whole if that fails (``OSError``)."""
    atomic_write(path, chrome_trace(*([devices] if isinstance(devices, Timeline) else devices)))


def read_chrome_trace(path: str | os.PathLike[str]) -> tuple[Timeline, ...]:
    """The timelines that ``write_chrome_trace`` wrote, of one device or several. Raises ``ValueError`` when the file is
    something else."""
    try:
        trace = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}), wanted a trace that isthmus wrote with --timeline") from error
    other = trace.get("otherData") if isinstance(trace, dict) else None
    version = other.get("isthmus_schema_version") if isinstance(other, dict) else None
    if version != 1:
        raise ValueError(
            f"{path}: otherData.isthmus_schema_version is {version!r}, wanted 1: "
            "pass a trace that isthmus wrote with --timeline"
        )
    lanes = {_lane_thread(lane): lane for lane in LANES}
    spans: defaultdict[int, list[Span]] = defaultdict(list)
    steps: defaultdict[int, list[tuple[int, float, float]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] != "X":
            continue
        start_ns = round(event["ts"] * 1e3)
        start_s, end_s = start_ns / 1e9, (start_ns + round(event["dur"] * 1e3)) / 1e9
        args = event["args"]
        if event["tid"] == _STEPS_THREAD:
            steps[event["pid"]].append((args["step"], start_s, end_s))
        else:
            span = Span(lane=lanes[event["tid"]], name=event["name"], start_s=start_s, end_s=end_s, **args)
            spans[event["pid"]].append(span)
    processes = sorted({event["pid"] for event in trace["traceEvents"]})
    return tuple(
        Timeline(schema_version=version, spans=tuple(spans[process]), steps=tuple(steps[process]))
        for process in processes
    )


def _lane_thread(lane: str) -> int:
    if lane not in LANES:
        raise ValueError(f"lane of a span is {lane!r}, wanted one of {', '.join(LANES)}")
    return LANES.index(lane) + _STEPS_THREAD + 1


_Thread = tuple[int, int]
"""Its process's number and its own."""


def _thread_metadata(thread: _Thread, title: str) -> list[dict[str, Any]]:
    return [_metadata("thread_name", thread, name=title), _metadata("thread_sort_index", thread, sort_index=thread[1])]


def _metadata(what: str, thread: _Thread, **args: str | int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": thread[0], "tid": thread[1], "args": args}


def _slice(
    name: str, category: str, thread: _Thread, start_s: float, end_s: float, args: dict[str, Any]
) -> dict[str, Any]:
    start_ns, end_ns = round(start_s * 1e9), round(end_s * 1e9)
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": thread[0],
        "tid": thread[1],
        "ts": start_ns / 1e3,
        "dur": (end_ns - start_ns) / 1e3,
        "args": args,
    }
