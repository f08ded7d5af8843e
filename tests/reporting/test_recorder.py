from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.reporting.recorder import Recorder
from isthmus.spec.timeline import LANES

DURATIONS = st.lists(st.tuples(st.sampled_from(LANES), st.integers(0, 100), st.integers(0, 50)), max_size=30)


@given(DURATIONS)
def test_busy_seconds_do_not_depend_on_keeping_spans(durations: list[tuple[str, int, int]]) -> None:
    kept, counted = Recorder(), Recorder(keep_spans=False)
    for lane, start, length in durations:
        for recorder in (kept, counted):
            recorder.add(lane, "x", float(start), float(start + length))
    for lane in LANES:
        wanted = sum(length for name, _, length in durations if name == lane)
        assert kept.busy_s(lane) == counted.busy_s(lane) == wanted
    assert len(kept.timeline().spans) == len(durations)
    assert counted.timeline().spans == ()


def test_timeline_holds_exactly_what_was_added_in_order_of_start() -> None:
    recorder = Recorder()
    recorder.add("d2h", "late", 2.0, 3.0, kind="gradient", num_bytes=7)
    recorder.add("cpu_experts", "early", 1.0, 4.0, num_tokens=5)
    recorder.step(1, 0.5, 4.5)
    timeline = recorder.timeline()
    assert [span.name for span in timeline.spans] == ["early", "late"]
    assert timeline.spans[1].kind == "gradient" and timeline.spans[1].num_bytes == 7
    assert timeline.spans[0].num_tokens == 5
    assert timeline.steps == ((1, 0.5, 4.5),)


def test_only_steps_asked_for_are_kept() -> None:
    recorder = Recorder(keep_spans=False)
    for step in range(3):
        recorder.keep_spans = step == 1
        recorder.add("h2d", f"of step {step}", float(step), step + 0.5)
        recorder.step(step, float(step), step + 1.0)
    timeline = recorder.timeline()
    assert [span.name for span in timeline.spans] == ["of step 1"]
    assert timeline.steps == ((1, 1.0, 2.0),)
    assert recorder.busy_s("h2d") == 1.5


def test_waiting_is_not_busy() -> None:
    recorder = Recorder()
    recorder.add("accelerator", "CPU experts", 0.0, 1.0, kind="wait")
    assert recorder.busy_s("accelerator") == 0.0
    assert len(recorder.timeline().spans) == 1


def test_no_second_is_lost_between_threads() -> None:
    recorder = Recorder(keep_spans=False)

    def add_many() -> None:
        for _ in range(5000):
            recorder.add("h2d", "x", 0.0, 1.0)

    threads = [threading.Thread(target=add_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recorder.busy_s("h2d") == 20_000


def test_span_is_recorded_when_its_body_raises() -> None:
    recorder = Recorder()
    with pytest.raises(KeyError), recorder.span("optimizer", "step", kind="optimizer", num_tokens=3):
        raise KeyError
    (span,) = recorder.timeline().spans
    assert (span.lane, span.name, span.kind, span.num_tokens) == ("optimizer", "step", "optimizer", 3)
    assert 0 <= span.start_s <= span.end_s <= recorder.now_s()


def test_disabled_recorder_stays_empty() -> None:
    recorder = Recorder(enabled=False)
    recorder.add("h2d", "x", 0.0, 1.0)
    recorder.step(1, 0.0, 1.0)
    with recorder.span("h2d", "y"):
        pass
    assert recorder.timeline().spans == () and recorder.timeline().steps == ()
    assert recorder.busy_s("h2d") == 0.0


@pytest.mark.parametrize("enabled", [True, False])
def test_unknown_lane_is_refused(enabled: bool) -> None:
    recorder = Recorder(enabled=enabled)
    with pytest.raises(ValueError, match="lane is 'gpu', wanted one of accelerator"):
        recorder.add("gpu", "x", 0.0, 1.0)
    with pytest.raises(ValueError, match="lane is 'gpu'"):
        recorder.span("gpu", "x")
    with pytest.raises(ValueError, match="lane is 'gpu'"):
        recorder.busy_s("gpu")


def test_end_before_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r"end_s of span 'x' is 1\.0, before its start_s 2\.0"):
        Recorder().add("h2d", "x", 2.0, 1.0)
    with pytest.raises(ValueError, match=r"end_s of step 4 is 1\.0"):
        Recorder().step(4, 2.0, 1.0)
