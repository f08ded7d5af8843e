"""Owns the record of what each lane did and when: engine threads and the training loop add spans while running,
reports read them."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from isthmus.spec.timeline import LANES, Span, Timeline


class Recorder:
    """Collects spans from any thread. Seconds count from the recorder's making.

    ``enabled`` False: every call but ``now_s`` does nothing. ``keep_spans`` may be switched between steps: while it is
    False nothing grows, only ``busy_s`` goes on counting, so that a long run keeps the few steps somebody will look
    at.
    """

    def __init__(self, enabled: bool = True, keep_spans: bool = True) -> None:
        self.enabled = enabled
        self.keep_spans = keep_spans
        self._origin_s = time.perf_counter()
        # Plain tuples: making a frozen dataclass costs more than the rest of ``add``, so that waits until ``timeline``.
        self._spans: list[tuple[str, str, float, float, str, int, int]] = []
        self._steps: list[tuple[int, float, float]] = []
        self._busy_s: dict[str, float] = dict.fromkeys(LANES, 0.0)
        self._busy_lock = threading.Lock()

    def now_s(self) -> float:
        """Seconds since the origin, on the clock all spans use."""
        return time.perf_counter() - self._origin_s

    def add(
        self,
        lane: str,
        name: str,
        start_s: float,
        end_s: float,
        *,
        kind: str = "",
        num_bytes: int = 0,
        num_tokens: int = 0,
    ) -> None:
        """Adds a span (``spec.timeline.Span``), seconds since the origin. Raises ``ValueError`` for an unknown lane or
        an end before its start."""
        _require_lane(lane)
        if not self.enabled:
            return
        if end_s < start_s:
            raise ValueError(f"end_s of span {name!r} is {end_s}, before its start_s {start_s}: take both from now_s()")
        if kind != "wait":
            with self._busy_lock:  # += on a float is a read and a write; two lanes' threads may come between
                self._busy_s[lane] += end_s - start_s
        if self.keep_spans:
            self._spans.append((lane, name, start_s, end_s, kind, num_bytes, num_tokens))

    def span(
        self, lane: str, name: str, *, kind: str = "", num_bytes: int = 0, num_tokens: int = 0
    ) -> AbstractContextManager[None]:
        """A context that adds a span around its body, also when the body raises. Raises ``ValueError`` for an unknown
        lane."""
        _require_lane(lane)
        if not self.enabled:
            return nullcontext()
        return _OpenSpan(self, lane, name, kind, num_bytes, num_tokens)

    def step(self, step: int, start_s: float, end_s: float) -> None:
        """Marks the bounds of a training step, kept under the same condition as spans."""
        if end_s < start_s:
            raise ValueError(f"end_s of step {step} is {end_s}, before its start_s {start_s}: take both from now_s()")
        if self.enabled and self.keep_spans:
            self._steps.append((step, start_s, end_s))

    def busy_s(self, lane: str) -> float:
        """Seconds ``lane`` has worked so far: the sum of its spans, kept or not, without those of kind ``wait``."""
        _require_lane(lane)
        with self._busy_lock:
            return self._busy_s[lane]

    def timeline(self) -> Timeline:
        """What was kept so far, spans by start. Other threads may go on adding."""
        spans = [
            Span(
                lane=lane,
                name=name,
                start_s=start_s,
                end_s=end_s,
                kind=kind,
                num_bytes=num_bytes,
                num_tokens=num_tokens,
            )
            for lane, name, start_s, end_s, kind, num_bytes, num_tokens in list(self._spans)
        ]
        spans.sort(key=lambda span: (span.start_s, LANES.index(span.lane), span.end_s))
        return Timeline(spans=tuple(spans), steps=tuple(sorted(list(self._steps))))


class _OpenSpan(AbstractContextManager[None]):
    __slots__ = ("_kind", "_lane", "_name", "_num_bytes", "_num_tokens", "_recorder", "_start_s")

    def __init__(self, recorder: Recorder, lane: str, name: str, kind: str, num_bytes: int, num_tokens: int) -> None:
        self._recorder = recorder
        self._lane = lane
        self._name = name
        self._kind = kind
        self._num_bytes = num_bytes
        self._num_tokens = num_tokens

    def __enter__(self) -> None:
        self._start_s = self._recorder.now_s()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.add(
            self._lane,
            self._name,
            self._start_s,
            self._recorder.now_s(),
            kind=self._kind,
            num_bytes=self._num_bytes,
            num_tokens=self._num_tokens,
        )


def _require_lane(lane: str) -> None:
    if lane not in LANES:
        raise ValueError(
            f"lane is {lane!r}, wanted one of {', '.join(LANES)}: add new lanes to isthmus.spec.timeline.LANES"
        )
