"""An accelerator that is not there: a separate memory and copy engines at set rates, emulated on the CPU.

Compute runs on the calling thread, at once. Each direction has a thread that really copies, and then holds the copy's
event back until a link of the given rate would have delivered it. Link time is kept apart from the time at which a
thread happens to run: a copy starts on the link when it was queued or when the one before it left, whichever is later,
so that the rate over many copies is exact however late the system wakes the thread. For the same reason, what an
``on_done`` queues counts as queued when the link had delivered: the emulating threads compete with compute for cores, a
real copy engine does not.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from isthmus.reporting.recorder import Recorder
from isthmus.tuning.accelerator.accounting import AccountedAccelerator
from isthmus.tuning.accelerator.base import Direction, Event
from isthmus.tuning.accelerator.copy_engine import CopyEngine, CopyEvent

_SHORTEST_WAIT_S = 50e-6
"""Waits of compute below this are thread switches rather than lack of data, and stay out of the timeline."""


CHUNK_S = 2e-3
"""A long copy can be interrupted by an urgent one after each chunk of this link time."""
_SMALLEST_CHUNK_BYTES = 1 << 16


class EmulatedAccelerator(AccountedAccelerator):
    """A copy takes ``latency_s`` + its bytes ÷ the direction's rate, plus what ``copy_delay()`` returns (for tests)."""

    name = "emulated"
    is_separate = True
    device = torch.device("cpu")

    def __init__(
        self,
        *,
        budget_bytes: int,
        recorder: Recorder,
        h2d_bytes_per_s: float,
        d2h_bytes_per_s: float,
        latency_s: float = 0.0,
        copy_delay: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(budget_bytes=budget_bytes, recorder=recorder)
        for field, rate in (("h2d_bytes_per_s", h2d_bytes_per_s), ("d2h_bytes_per_s", d2h_bytes_per_s)):
            if not rate > 0:
                raise ValueError(f"{field}: got {rate}, wanted bytes per second above 0, e.g. 2e9 for 2 GB/s.")
        if not (latency_s >= 0 and math.isfinite(latency_s)):
            raise ValueError(f"latency_s: got {latency_s}, wanted seconds per copy, 0 or more.")
        self.h2d_bytes_per_s = h2d_bytes_per_s
        self.d2h_bytes_per_s = d2h_bytes_per_s
        self.latency_s = latency_s
        self.copy_delay = copy_delay
        self._engines: dict[Direction, CopyEngine] = {
            "h2d": CopyEngine("isthmus-h2d"),
            "d2h": CopyEngine("isthmus-d2h"),
        }
        self._now = threading.local()
        """``s``: what time it is for ``on_done``, on the threads that call it."""
        self._link_free_at_s: dict[Direction, float] = {"h2d": 0.0, "d2h": 0.0}

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

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
        self._check_copy(destination, source, direction)
        event = CopyEvent(name)
        self._begin(event, destination, direction)
        queued_s = getattr(self._now, "s", None) or self.recorder.now_s()
        end_s = queued_s

        def job() -> None:
            nonlocal end_s
            end_s = self._transfer(destination, source, direction, queued_s, after, is_urgent, name, kind)

        def ended(error: BaseException | None) -> None:
            if error is None:
                self._arrived(event)
            event.happen(end_s, error)
            if on_done is not None:
                self._now.s = end_s
                try:
                    on_done()
                finally:
                    self._now.s = None

        self._engines[direction].submit(job, ended, is_urgent=is_urgent)
        return event

    def _transfer(
        self,
        destination: Tensor,
        source: Tensor,
        direction: Direction,
        queued_s: float,
        after: Event | None,
        is_urgent: bool,
        name: str,
        kind: str,
    ) -> float:
        """Runs on the direction's thread; returns when the link has delivered, and the time at which it did."""
        if after is not None:
            after.wait()
            queued_s = max(queued_s, after.at_s if isinstance(after, CopyEvent) else self.recorder.now_s())
        num_bytes = source.numel() * source.element_size()
        rate = self.h2d_bytes_per_s if direction == "h2d" else self.d2h_bytes_per_s
        if self.copy_delay is not None:
            # Before the data moves, so that whoever reads without waiting reads something else.
            delay_s = self.copy_delay()
            time.sleep(delay_s)
            queued_s = max(queued_s, self._link_free_at_s[direction]) + delay_s
        chunk_bytes = max(_SMALLEST_CHUNK_BYTES, int(rate * CHUNK_S))
        begun_s, end_s, latency_s = None, queued_s, self.latency_s
        for offset in range(0, num_bytes, chunk_bytes) or (0,):
            if not is_urgent:
                self._engines[direction].let_urgent_in()
            start_s = max(queued_s, self._link_free_at_s[direction])
            if begun_s is not None and start_s > end_s:
                self.recorder.add(direction, name, begun_s, end_s, kind=kind)
                begun_s = None
            begun_s = start_s if begun_s is None else begun_s
            length = min(chunk_bytes, num_bytes - offset)
            end_s = start_s + latency_s + length / rate
            latency_s = 0.0
            # Not Tensor.copy_: that would spread over the cores that compute is using. memmove gives the GIL back, too.
            ctypes.memmove(destination.data_ptr() + offset, source.data_ptr() + offset, length)
            remaining_s = end_s - self.recorder.now_s()
            if remaining_s > 0:
                time.sleep(remaining_s)
            self._link_free_at_s[direction] = end_s
        self.recorder.add(direction, name, end_s if begun_s is None else begun_s, end_s, kind=kind, num_bytes=num_bytes)
        return end_s

    def record(self) -> Event:
        return CopyEvent("compute", happened_s=self.recorder.now_s())

    def wait_for(self, event: Event) -> None:
        start_s = self.recorder.now_s()
        event.wait()
        end_s = self.recorder.now_s()
        if end_s - start_s > _SHORTEST_WAIT_S:
            name = event.name if isinstance(event, CopyEvent) else ""
            self.recorder.add("accelerator", name, start_s, end_s, kind="wait")

    def compute(self, name: str, *, kind: str = "", num_tokens: int = 0) -> AbstractContextManager[None]:
        return self.recorder.span("accelerator", name, kind=kind, num_tokens=num_tokens)

    def synchronize(self) -> None:
        for engine in self._engines.values():
            engine.drain()

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        super().close()
