from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.reporting.chrome_trace import chrome_trace, read_chrome_trace, write_chrome_trace
from isthmus.spec.timeline import LANES, Span, Timeline

GOLDEN = Path(__file__).parent / "golden" / "chrome_trace.json"
SMALL = Timeline(
    spans=(
        Span(lane="h2d", name="L0 E3", start_s=0.0, end_s=0.0055, kind="load_expert", num_bytes=11_000_000),
        Span(lane="accelerator", name="L0: “é”", start_s=0.001, end_s=0.0055, kind="wait"),
        Span(lane="cpu_experts", name="L0", start_s=0.001234567, end_s=0.002, kind="expert_forward", num_tokens=17),
        Span(lane="optimizer", name="plain", start_s=0.002, end_s=0.003),
    ),
    steps=((3, 0.0, 0.006),),
)
NANOSECONDS = st.integers(0, 10**13)


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    def times() -> tuple[float, float]:
        start_ns, end_ns = sorted((draw(NANOSECONDS), draw(NANOSECONDS)))
        return start_ns / 1e9, end_ns / 1e9

    bounds = [times() for _ in range(draw(st.integers(0, 5)))]
    spans = tuple(
        Span(
            start_s=start_s,
            end_s=end_s,
            lane=draw(st.sampled_from(LANES)),
            name=draw(st.text()),
            kind=draw(st.text()),
            num_bytes=draw(st.integers(0, 2**60)),
            num_tokens=draw(st.integers(0, 2**40)),
        )
        for start_s, end_s in bounds
    )
    bounds = [times() for _ in range(draw(st.integers(0, 3)))]
    steps = tuple((step, start_s, end_s) for step, (start_s, end_s) in enumerate(bounds))
    return Timeline(spans=spans, steps=steps)


def test_format_stays_as_it_is() -> None:
    assert chrome_trace(SMALL) == GOLDEN.read_text(encoding="utf-8")


def test_every_lane_is_a_named_and_sorted_thread() -> None:
    events = json.loads(chrome_trace(SMALL))["traceEvents"]
    names = {event["tid"] for event in events if event["name"] == "thread_name"}
    order = {event["tid"]: event["args"]["sort_index"] for event in events if event["name"] == "thread_sort_index"}
    assert names == set(order) == set(range(1, len(LANES) + 2))
    assert sorted(order, key=order.__getitem__) == list(range(1, len(LANES) + 2))
    assert all({"ts", "dur"} <= event.keys() for event in events if event["ph"] == "X")


@given(st.lists(timelines(), min_size=1, max_size=3))
def test_timelines_of_devices_survive_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, devices: list[Timeline]
) -> None:
    path = tmp_path_factory.getbasetemp() / "trace.json"
    path.write_text(chrome_trace(*devices), encoding="utf-8")
    assert read_chrome_trace(path) == tuple(devices)


def test_every_device_is_a_process_with_its_name() -> None:
    events = json.loads(chrome_trace(SMALL, SMALL))["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {1: "device 0", 2: "device 1"}


def test_written_trace_reads_back(tmp_path: Path, run_timeline: Timeline) -> None:
    write_chrome_trace(run_timeline, tmp_path / "deep" / "trace.json")
    (back,) = read_chrome_trace(tmp_path / "deep" / "trace.json")
    assert len(back.spans) == len(run_timeline.spans) and len(back.steps) == len(run_timeline.steps)
    for was, now in zip(run_timeline.spans, back.spans, strict=True):
        assert (now.lane, now.name, now.kind, now.num_bytes) == (was.lane, was.name, was.kind, was.num_bytes)
        assert now.start_s == pytest.approx(was.start_s, abs=1e-9) and now.end_s == pytest.approx(was.end_s, abs=1e-9)


def test_failed_write_leaves_the_previous_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    write_chrome_trace(SMALL, path)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_chrome_trace(Timeline(spans=()), path)
    assert read_chrome_trace(path) == (SMALL,)


@pytest.mark.parametrize("text", ["{", "[]", '{"traceEvents": []}', '{"otherData": {"isthmus_schema_version": 2}}'])
def test_foreign_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: .*wanted .*--timeline"):
        read_chrome_trace(path)


def test_unknown_lane_is_refused() -> None:
    with pytest.raises(ValueError, match="lane of a span is 'gpu'"):
        chrome_trace(Timeline(spans=(Span(lane="gpu", name="x", start_s=0.0, end_s=1.0),)))
