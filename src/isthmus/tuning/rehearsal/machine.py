"""What a process of the runtime computes and copies with, on a clock: its accelerator, its CPU worker, its messages.

They have the methods of the real ones, so that the runtime's own loader, dense units, optimizer and policies work on
them. Tensors stand for memory and have none.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isthmus.reporting.recorder import Recorder
from isthmus.tuning.accelerator.base import Accelerator, Direction, Event
from isthmus.tuning.accelerator.emulated import CHUNK_S
from isthmus.tuning.rehearsal.clock import Clock, Cores, Happening

Priority = float


class ClockRecorder(Recorder):
    """Spans in seconds of the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def now_s(self) -> float:
        return self._clock.now_s


@dataclass(frozen=True, kw_only=True)
class LinkCosts:
    """Seconds of copies. ``core_s_per_byte``: of a core, while the link is at it; 0 where an engine of its own
    copies."""

    s_per_byte: dict[Direction, float]
    latency_s: float
    core_s_per_byte: float


class CopyLane:
    """One direction of a link: a thread that copies, what is urgent first."""

    def __init__(self, direction: Direction, clock: Clock, cores: Cores, recorder: Recorder, costs: LinkCosts) -> None:
        self._direction: Direction = direction
        self._clock, self._cores, self._recorder, self._costs = clock, cores, recorder, costs
        self._jobs: deque[Callable[[], None]] = deque()
        self._urgent: deque[Callable[[], None]] = deque()
        self._wakes = Happening(clock)
        self._free_at_s = 0.0
        self.num_bytes = 0
        clock.start(self._run)

    def submit(
        self, num_bytes: int, name: str, kind: str, after: Event | None, is_urgent: bool, on_done: Callable[[], object]
    ) -> None:
        """``on_done()`` once the link has delivered."""
        queued_s = self._clock.now_s
        self.num_bytes += num_bytes

        def job() -> None:
            self._carry(num_bytes, name, kind, queued_s, after, is_urgent)
            on_done()

        (self._urgent if is_urgent else self._jobs).append(job)
        self._wakes.happen()

    def _run(self) -> None:
        while True:
            self._let_urgent_in()
            if self._jobs:
                self._jobs.popleft()()
            elif not self._urgent:
                self._wakes = Happening(self._clock)
                self._wakes.wait()

    def _let_urgent_in(self) -> None:
        while self._urgent:
            self._urgent.popleft()()

    def _carry(
        self, num_bytes: int, name: str, kind: str, queued_s: float, after: Event | None, is_urgent: bool
    ) -> None:
        if after is not None and not after.is_done():
            after.wait()
            queued_s = self._clock.now_s
        s_per_byte, latency_s = self._costs.s_per_byte[self._direction], self._costs.latency_s
        num_chunks = max(1, math.ceil(num_bytes * s_per_byte / CHUNK_S))
        chunk_bytes = num_bytes / num_chunks
        begun_s = end_s = max(queued_s, self._free_at_s)
        for _ in range(num_chunks):
            if not is_urgent:
                self._let_urgent_in()
            end_s = max(queued_s, self._free_at_s) + latency_s + chunk_bytes * s_per_byte
            latency_s = 0.0
            self._cores.work(chunk_bytes * self._costs.core_s_per_byte)
            self._clock.sleep_until(end_s)
            self._free_at_s = end_s
        self._recorder.add(self._direction, name, min(begun_s, end_s), end_s, kind=kind, num_bytes=num_bytes)


class ClockAccelerator(Accelerator):
    """A separate memory whose copies take the clock's time. Computing is not its business."""

    name = "rehearsed"
    is_separate = True
    device = torch.device("meta")

    def __init__(self, clock: Clock, cores: Cores, recorder: Recorder, costs: LinkCosts) -> None:
        self.recorder = recorder
        self.budget_bytes = self.allocated_bytes = self.peak_bytes = 0
        self._clock = clock
        self._lanes: dict[Direction, CopyLane] = {
            direction: CopyLane(direction, clock, cores, recorder, costs) for direction in ("h2d", "d2h")
        }

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Slots (two dimensions) have an address each, and no memory beyond it."""
        if len(shape) == 2:
            return torch.empty((shape[0], 1), dtype=dtype).expand(shape)
        return torch.empty(shape, dtype=dtype, device="meta")

    def free(self, tensor: Tensor) -> None: ...

    def reserve(self, num_bytes: int) -> None: ...

    def allocate_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An address, and no memory beyond it."""
        return torch.empty((1,) * len(shape), dtype=dtype).expand(shape)

    def copy(
        self,
        destination: Tensor,
        source: Tensor,
        direction: Direction,
        *,
        name: str = "",
        kind: str = "",
        after: Event | None = None,
        is_urgent: bool = False,
        on_done: Callable[[], object] | None = None,
    ) -> Event:
        num_bytes = source.numel() * source.element_size()
        return self.transfer(
            num_bytes, direction, name=name, kind=kind, after=after, is_urgent=is_urgent, on_done=on_done
        )

    def transfer(
        self,
        num_bytes: int,
        direction: Direction,
        *,
        name: str = "",
        kind: str = "",
        after: Event | None = None,
        is_urgent: bool = False,
        on_done: Callable[[], object] | None = None,
    ) -> Happening:
        """As ``copy``, of so many bytes."""
        event = Happening(self._clock)

        def ended() -> None:
            event.happen()
            if on_done is not None:
                on_done()

        self._lanes[direction].submit(num_bytes, name, kind, after, is_urgent, ended)
        return event

    def record(self) -> Event:
        return Happening(self._clock, has_happened=True)

    def wait_for(self, event: Event) -> None:
        start_s = self.recorder.now_s()
        event.wait()
        self.recorder.add("accelerator", "", start_s, self.recorder.now_s(), kind="wait")

    def require_resident(self, *tensors: Tensor) -> None: ...

    def compute(self, name: str, *, kind: str = "", num_tokens: int = 0) -> AbstractContextManager[None]:
        return self.recorder.span("accelerator", name, kind=kind, num_tokens=num_tokens)

    def synchronize(self) -> None: ...

    def copied_bytes(self) -> dict[Direction, int]:
        return {direction: lane.num_bytes for direction, lane in self._lanes.items()}

    def close(self) -> None: ...


class ClockWorker:
    """As ``CpuWorker``: one thread, most urgent first. A task takes what it asks the cores for."""

    def __init__(self, clock: Clock, recorder: Recorder) -> None:
        self._clock, self._recorder = clock, recorder
        self._heap: list[tuple[Priority, int, Callable[[], Any], Happening, tuple[str, str, str, int]]] = []
        self._order = itertools.count()
        self._wakes = Happening(clock)
        clock.start(self._run)

    def submit(
        self,
        task: Callable[[], Any],
        *,
        priority: Priority,
        lane: str = "cpu_experts",
        name: str = "",
        kind: str = "",
        num_tokens: int = 0,
    ) -> Happening:
        done = Happening(self._clock)
        heapq.heappush(self._heap, (priority, next(self._order), task, done, (lane, name, kind, num_tokens)))
        self._wakes.happen()
        return done

    def _run(self) -> None:
        while True:
            while not self._heap:
                self._wakes = Happening(self._clock)
                self._wakes.wait()
            _, _, task, done, (lane, name, kind, num_tokens) = heapq.heappop(self._heap)
            start_s = self._recorder.now_s()
            task()
            self._recorder.add(lane, name, start_s, self._recorder.now_s(), kind=kind, num_tokens=num_tokens)
            done.happen()
