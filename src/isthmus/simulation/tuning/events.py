"""The clock of a simulation, and the resources that serve one piece of work at a time.

Everything happens in the order of time, of equal times in the order in which it was asked for: the same input gives the
same schedule, bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any

from isthmus.spec.timeline import Span


class Events:
    """What happens when. ``now_s``: seconds since the step began."""

    __slots__ = ("_heap", "_is_stopped", "_order", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self._order = count()
        self._is_stopped = False
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """``action(*arguments)`` at ``time_s``, which is not before ``now_s``."""
        heappush(self._heap, (time_s, next(self._order), action, arguments))

    def run(self) -> None:
        """Until nothing is left to happen, or somebody stops it."""
        heap = self._heap
        while heap and not self._is_stopped:
            self.now_s, _, action, arguments = heappop(heap)
            action(*arguments)

    def stop(self) -> None:
        """What has not happened yet does not."""
        self._is_stopped = True


class Lane:
    """What one resource of a device did: seconds and bytes, and its spans where somebody wants to see them."""

    __slots__ = ("busy_s", "name", "num_bytes", "spans")

    def __init__(self, name: str, spans: list[Span] | None) -> None:
        self.name = name
        self.spans = spans
        self.busy_s = 0.0
        self.num_bytes = 0

    def add(self, kind: str, name: str, start_s: float, end_s: float, num_bytes: int = 0, num_tokens: int = 0) -> None:
        self.busy_s = self.busy_s + end_s - start_s
        self.num_bytes += num_bytes
        if self.spans is not None and end_s > start_s:
            span = Span(
                lane=self.name,
                kind=kind,
                name=name,
                start_s=start_s,
                end_s=end_s,
                num_bytes=num_bytes,
                num_tokens=num_tokens,
            )
            self.spans.append(span)

    def wait(self, name: str, start_s: float, end_s: float) -> None:
        """Nothing was done meanwhile: not busy."""
        if self.spans is not None and end_s > start_s:
            self.spans.append(Span(lane=self.name, kind="wait", name=name, start_s=start_s, end_s=end_s))


class Record:
    """One device's lanes."""

    __slots__ = ("_lanes", "spans")

    def __init__(self, keeps_spans: bool) -> None:
        self.spans: list[Span] | None = [] if keeps_spans else None
        self._lanes: dict[str, Lane] = {}

    def lane(self, name: str) -> Lane:
        """The one of this name."""
        return self._lanes.setdefault(name, Lane(name, self.spans))

    @property
    def busy_s(self) -> dict[str, float]:
        """Seconds by lane, of those that did something."""
        return {name: lane.busy_s for name, lane in self._lanes.items() if lane.busy_s}

    @property
    def num_bytes(self) -> dict[str, int]:
        return {name: lane.num_bytes for name, lane in self._lanes.items() if lane.num_bytes}


class CpuPool:
    """The cores of one process, all on one expert at a time, first come first served. The optimizer's steps are
    interrupted whenever an expert comes, and go on where they were; of those that wait the next forward's first layer
    is stepped first."""

    __slots__ = ("_adam", "_began_s", "_events", "_experts", "_is_busy", "_lane", "_running", "_steps", "_version")

    def __init__(self, events: Events, record: Record) -> None:
        self._events = events
        self._lane, self._adam = record.lane("cpu_experts"), record.lane("optimizer")
        self._experts: deque[tuple[float, Callable[[], None], str, str, int]] = deque()
        self._steps: list[tuple[int, float, Callable[[], None]]] = []
        """A heap of (layer, seconds left, what follows)."""
        self._is_busy = False
        self._running: tuple[int, float, Callable[[], None]] | None = None
        """The optimizer's step under way since ``_began_s``."""
        self._began_s = 0.0
        self._version = 0

    def compute(self, seconds: float, then: Callable[[], None], *, kind: str, name: str, num_tokens: int) -> None:
        if self._is_busy:
            self._experts.append((seconds, then, kind, name, num_tokens))
        else:
            self._pause()
            self._begin(seconds, then, kind, name, num_tokens)

    def step(self, layer: int, seconds: float, then: Callable[[], None]) -> None:
        """An optimizer's step. A layer is stepped once at a time."""
        heappush(self._steps, (layer, seconds, then))
        if not self._is_busy and self._running is None:
            self._next()

    def _pause(self) -> None:
        if self._running is None:
            return
        layer, left_s, then = self._running
        now_s = self._events.now_s
        heappush(self._steps, (layer, left_s - (now_s - self._began_s), then))
        self._adam.add("optimizer", f"L{layer}", self._began_s, now_s)
        self._running = None
        self._version += 1

    def _next(self) -> None:
        """Nothing runs: begins what comes first."""
        if self._experts:
            self._begin(*self._experts.popleft())
        elif self._steps:
            self._running = heappop(self._steps)
            now_s = self._began_s = self._events.now_s
            self._events.at(now_s + self._running[1], self._stepped, self._version)

    def _begin(self, seconds: float, then: Callable[[], None], kind: str, name: str, num_tokens: int) -> None:
        now_s = self._events.now_s
        self._is_busy = True
        self._lane.add(kind, name, now_s, now_s + seconds, num_tokens=num_tokens)
        self._events.at(now_s + seconds, self._computed, then)

    def _computed(self, then: Callable[[], None]) -> None:
        self._is_busy = False
        then()
        if not self._is_busy and self._running is None:
            self._next()

    def _stepped(self, version: int) -> None:
        if version != self._version or self._running is None:
            return
        layer, _, then = self._running
        self._adam.add("optimizer", f"L{layer}", self._began_s, self._events.now_s)
        self._running = None
        self._version += 1
        then()
        if not self._is_busy and self._running is None:
            self._next()


class Server:
    """A resource that is taken in the order of asking, such as one direction of a host's network."""

    __slots__ = ("_events", "_free_s")

    def __init__(self, events: Events) -> None:
        self._events = events
        self._free_s = 0.0

    def serve(self, seconds: float, then: Callable[..., None], *arguments: Any) -> None:
        self._free_s = max(self._free_s, self._events.now_s) + seconds
        self._events.at(self._free_s, then, *arguments)
