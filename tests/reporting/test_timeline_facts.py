from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.reporting.timeline_facts import busy_s, clip, find_waits, middle_steps
from isthmus.spec.timeline import Span, Timeline


def span(lane: str, start_s: float, end_s: float, kind: str = "", name: str = "x") -> Span:
    return Span(lane=lane, name=name, start_s=start_s, end_s=end_s, kind=kind)


def steps(num_steps: int) -> Timeline:
    return Timeline(spans=(), steps=tuple((step, float(step), step + 1.0) for step in range(num_steps)))


@pytest.mark.parametrize(
    ("available", "wanted", "shown"),
    [(0, 2, []), (1, 2, [0]), (2, 1, [1]), (5, 1, [2]), (5, 2, [2, 3]), (6, 2, [2, 3])],
)
def test_shown_steps_come_from_the_middle(available: int, wanted: int, shown: list[int]) -> None:
    assert [step for step, _, _ in middle_steps(steps(available), wanted)] == shown


def test_no_steps_to_show_is_refused() -> None:
    with pytest.raises(ValueError, match="num_steps is 0"):
        middle_steps(steps(3), 0)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20), st.booleans())))
def test_busy_seconds_count_each_moment_once_and_no_waiting(bars: list[tuple[int, int, bool]]) -> None:
    spans = [
        span("accelerator", float(start), float(start + length), "wait" if waits else "dense")
        for start, length, waits in bars
    ]
    working = {moment for start, length, waits in bars if not waits for moment in range(start, start + length)}
    waiting = {moment for start, length, waits in bars if waits for moment in range(start, start + length)}
    assert busy_s(spans) == len(working - waiting)


def test_clip_keeps_what_lies_inside() -> None:
    spans = [span("h2d", 0.0, 2.0), span("h2d", 4.0, 9.0), span("h2d", 2.5, 3.0), span("h2d", 5.0, 6.0)]
    assert [(part.start_s, part.end_s) for part in clip(spans, 1.0, 5.0)] == [(1.0, 2.0), (2.5, 3.0), (4.0, 5.0)]


def test_cause_is_what_ended_when_the_wait_did() -> None:
    wait = span("accelerator", 1.0, 2.0, "wait")
    load = span("h2d", 0.5, 1.9999, "load_expert")
    others = [span("d2h", 0.5, 1.5), span("optimizer", 0.0, 5.0), span("accelerator", 0.0, 2.0)]
    (found,) = find_waits([*others, load, wait])
    assert found.span == wait and found.cause == load


def test_token_copy_is_followed_back_to_the_cpu_experts() -> None:
    experts = span("cpu_experts", 0.5, 1.8, "expert_forward")
    results = span("h2d", 1.8001, 2.0, "tokens")
    (found,) = find_waits([experts, results, span("accelerator", 1.0, 2.0, "wait")])
    assert found.cause == experts


def test_token_copy_that_stood_in_line_is_itself_the_cause() -> None:
    experts = span("cpu_experts", 0.5, 1.2, "expert_forward")
    results = span("h2d", 1.8, 2.0, "tokens")
    (found,) = find_waits([experts, results, span("accelerator", 1.0, 2.0, "wait")])
    assert found.cause == results


def test_gradient_is_the_cause_only_when_nothing_else_ended() -> None:
    wait, gradient = span("accelerator", 1.0, 2.0, "wait"), span("d2h", 1.5, 2.0, "gradient")
    load = span("h2d", 1.5, 1.999, "load_expert")
    assert [found.cause for found in find_waits([gradient, load, wait])] == [load]
    assert [found.cause for found in find_waits([gradient, wait])] == [gradient]


def test_wait_without_a_visible_cause_has_none() -> None:
    (found,) = find_waits([span("accelerator", 1.0, 2.0, "wait"), span("h2d", 0.0, 1.5), span("d2h", 1.0, 2.5)])
    assert found.cause is None
