"""Owns what a picture of a timeline says in numbers: which steps it shows, how busy each lane was, what each wait
waited for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from isthmus.spec.timeline import Span, Timeline

WAIT = "wait"
_CAUSE_TOLERANCE_S = 200e-6
"""How far a wait's end and its cause's may lie apart: waking a thread takes time, clocks are read after the fact."""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """A span of kind ``wait`` and the span of another lane that it waited for (None: nothing ended then)."""

    span: Span
    cause: Span | None


def middle_steps(timeline: Timeline, num_steps: int) -> tuple[tuple[int, float, float], ...]:
    """``num_steps`` consecutive steps (fewer when there are fewer) from the middle, where caches are warm and nothing
    ends."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, wanted 1 or more steps to show")
    steps = sorted(timeline.steps, key=lambda step: step[1])
    first = max(0, (len(steps) - num_steps + 1) // 2)
    return tuple(steps[first : first + num_steps])


def window(steps: Sequence[tuple[int, float, float]], spans: Sequence[Span]) -> tuple[float, float]:
    """(start_s, end_s) of ``steps``, in their order; of ``spans`` where there are none, and zeros where neither are."""
    if steps:
        return steps[0][1], steps[-1][2]
    return min((span.start_s for span in spans), default=0.0), max((span.end_s for span in spans), default=0.0)


def clip(spans: Iterable[Span], start_s: float, end_s: float) -> tuple[Span, ...]:
    """The parts of ``spans`` inside ``[start_s, end_s]``, by start. Bytes and tokens stay those of the whole span."""
    inside = [
        replace(span, start_s=max(span.start_s, start_s), end_s=min(span.end_s, end_s))
        for span in spans
        if span.start_s < end_s and span.end_s > start_s
    ]
    return tuple(sorted(inside, key=lambda span: (span.start_s, span.end_s)))


def busy_s(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of ``spans`` (of one lane) works and none waits; overlaps count once."""
    spans = tuple(spans)
    waits = [(span.start_s, span.end_s) for span in spans if span.kind == WAIT]
    return _covered_s((span.start_s, span.end_s) for span in spans) - _covered_s(waits)


def find_waits(spans: Iterable[Span]) -> tuple[Wait, ...]:
    """Every wait among ``spans`` with its cause: what ended in another lane closest to the end of the wait.

    A copy of tokens is followed back to the CPU experts whose result it carried at once, so that waiting for them says
    so. A timeline has no edges between spans: this is a reading, not a record, and the cause is None where nothing
    ended near the wait's end.
    """
    spans = tuple(spans)
    work = [span for span in spans if span.kind != WAIT]
    computed = [span for span in work if span.lane == "cpu_experts"]
    waits = []
    for wait in spans:
        if wait.kind != WAIT:
            continue
        tolerance_s = max(_CAUSE_TOLERANCE_S, 0.05 * (wait.end_s - wait.start_s))
        others = [span for span in work if span.lane != wait.lane and span.end_s > wait.start_s]
        cause = _ended_at(others, wait.end_s, tolerance_s)
        if cause is not None and cause.kind == "tokens" and wait.lane != "cpu_experts":
            cause = _ended_at(computed, cause.start_s, _CAUSE_TOLERANCE_S) or cause
        waits.append(Wait(span=wait, cause=cause))
    return tuple(waits)


def _ended_at(spans: Iterable[Span], moment_s: float, tolerance_s: float) -> Span | None:
    """What ended closest to ``moment_s``: at most ``tolerance_s`` before, or a thread's waking after."""
    near = [span for span in spans if -tolerance_s <= span.end_s - moment_s <= _CAUSE_TOLERANCE_S]
    # Gradients leave, and compute hardly ever waits for that: anything else that ended then is likelier.
    return min(near, key=lambda span: (span.kind == "gradient", abs(span.end_s - moment_s)), default=None)


def _covered_s(intervals: Iterable[tuple[float, float]]) -> float:
    covered_s = 0.0
    reached_s = float("-inf")
    for start_s, end_s in sorted(intervals):
        covered_s += max(0.0, end_s - max(start_s, reached_s))
        reached_s = max(reached_s, end_s)
    return covered_s
