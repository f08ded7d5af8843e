"""A CUDA device: compute on its current stream, one more stream per copy direction, pinned host memory, event timing.

Order on the device is made of streams and events alone. One thread per direction waits for each copy's end, to call
``on_done`` and to keep the copy's tensors alive until then, so that the caching allocator cannot hand them out early.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isthmus.reporting.recorder import Recorder
from isthmus.spec.errors import IsthmusError
from isthmus.tuning.accelerator.accounting import AccountedAccelerator, zeroed_pages
from isthmus.tuning.accelerator.base import Direction, Event
from isthmus.tuning.accelerator.copy_engine import CopyEngine

_REGISTER_PORTABLE = 1
_CLOCK_VALID_S = 10.0
"""Device and host clocks drift, and event times are FP32 milliseconds: both are compared anew this often."""


class CudaEvent:
    """Implements ``Event`` by an event of the device. An error of the device surfaces in every later call to it."""

    __slots__ = ("end",)

    def __init__(self, end: torch.cuda.Event) -> None:
        self.end = end

    def is_done(self) -> bool:
        return self.end.query()

    def wait(self) -> None:
        self.end.synchronize()


def _runtime() -> Any:
    """The CUDA runtime's own functions (initialises CUDA)."""
    return torch.cuda.cudart()


@dataclass(frozen=True, slots=True)
class _OpenSpan:
    """A span between two device events, waiting for the second one."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    lane: str
    name: str
    kind: str
    num_bytes: int = 0
    num_tokens: int = 0


_CHUNK_BYTES = 16 << 20
"""Long copies are queued in pieces of this size, between which urgent ones run."""


class CudaAccelerator(AccountedAccelerator):
    """The current CUDA device at construction. Compute must be issued on the stream that is current at construction.

    The budget counts what is handed out and reserved; the caching allocator's own rounding comes on top.
    """

    name = "cuda"
    is_separate = True

    def __init__(self, *, budget_bytes: int, recorder: Recorder) -> None:
        super().__init__(budget_bytes=budget_bytes, recorder=recorder)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._compute = torch.cuda.current_stream(self.device)
        self._clock = torch.cuda.Stream(self.device)
        # Urgent copies have a stream of their own: the copy engine takes them between the chunks of the others.
        ways = [(direction, is_urgent) for direction in ("h2d", "d2h") for is_urgent in (False, True)]
        self._streams = {way: torch.cuda.Stream(self.device, priority=-1 if way[1] else 0) for way in ways}
        self._engines = {way: CopyEngine(f"isthmus-{way[0]}{'-urgent' * way[1]}") for way in ways}
        # The stream's order must be the order in which the thread waits.
        self._order = {way: threading.Lock() for way in ways}
        self._usable_from: dict[int, torch.cuda.Event] = {}
        self._pinned: list[Tensor] = []
        self._spans: deque[_OpenSpan] = deque()
        self._spans_lock = threading.Lock()
        self._anchor = self._compare_clocks()

    # --- memory ----------------------------------------------------------------------------------------------------

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with torch.cuda.stream(self._compute):
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
        # The allocator reuses memory in the order of the compute stream: kernels there may still work on it.
        usable_from = torch.cuda.Event()
        usable_from.record(self._compute)
        self._usable_from[tensor.untyped_storage().data_ptr()] = usable_from
        return tensor

    def allocate_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = zeroed_pages(shape, dtype)
        num_bytes = tensor.numel() * tensor.element_size()
        if not num_bytes:
            return tensor
        # Registered rather than allocated pinned: PyTorch rounds pinned allocations up to a power of two.
        with torch.cuda.device(self.device):
            error = int(_runtime().cudaHostRegister(tensor.data_ptr(), num_bytes, _REGISTER_PORTABLE))
        if error:
            raise IsthmusError(
                f"pinned host memory: CUDA error {error} when pinning {num_bytes} bytes; wanted as much free memory "
                "that may be locked: free host memory or raise the limit (ulimit -l, or the container's memory limit)."
            )
        with self._lock:
            self._pinned.append(tensor)
        return tensor

    def _is_host(self, tensor: Tensor) -> bool:
        return not tensor.is_cuda

    # --- copies and order --------------------------------------------------------------------------------------------

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
        stream = self._streams[direction, is_urgent]
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True, blocking=True)
        event = CudaEvent(end)
        num_bytes = source.numel() * source.element_size()

        def ended(error: BaseException | None) -> None:
            if error is None:
                self._arrived(event)
                self._resolve_spans()
            if on_done is not None:
                on_done()

        with self._order[direction, is_urgent]:
            self._begin(event, destination, direction)
            self._order_after(stream, destination, direction, after)
            with torch.cuda.stream(stream), torch.no_grad():
                start.record(stream)
                parts = (
                    tensor.reshape(-1).split(_CHUNK_BYTES // tensor.element_size()) for tensor in (destination, source)
                )
                for to, of in zip(*parts, strict=True):
                    to.copy_(of, non_blocking=True)
                end.record(stream)
            self._keep(_OpenSpan(start, end, direction, name, kind, num_bytes=num_bytes))
            self._engines[direction, is_urgent].submit(lambda: self._wait_for_copy(end, destination, source), ended)
        return event

    @staticmethod
    def _wait_for_copy(end: torch.cuda.Event, *alive: Tensor) -> None:
        end.synchronize()

    def _order_after(
        self, stream: torch.cuda.Stream, destination: Tensor, direction: Direction, after: Event | None
    ) -> None:
        usable_from = self._usable_from.pop(destination.untyped_storage().data_ptr(), None)
        if usable_from is not None:
            stream.wait_event(usable_from)
        if isinstance(after, CudaEvent):
            stream.wait_event(after.end)
        elif after is not None:
            after.wait()
        elif direction == "d2h" or not self._holds(destination):
            # Memory of the framework's, read or written by whatever compute was issued last.
            stream.wait_stream(self._compute)

    def record(self) -> Event:
        end = torch.cuda.Event(blocking=True)
        end.record(self._compute)
        return CudaEvent(end)

    def wait_for(self, event: Event) -> None:
        if isinstance(event, CudaEvent):
            self._compute.wait_event(event.end)
        else:
            event.wait()
        self._arrived(event)

    def synchronize(self) -> None:
        self._compute.synchronize()
        for stream in self._streams.values():
            stream.synchronize()
        for engine in self._engines.values():
            engine.drain()
        self._resolve_spans()

    def close(self) -> None:
        if self._is_closed:
            return
        try:
            # The threads' tensors must outlive the copies, and nothing may be unpinned under one.
            torch.cuda.synchronize(self.device)
        finally:
            for engine in self._engines.values():
                engine.close()
            super().close()
            for tensor in self._pinned:
                _runtime().cudaHostUnregister(tensor.data_ptr())
            self._pinned.clear()

    # --- timeline ----------------------------------------------------------------------------------------------------

    @contextmanager
    def compute(self, name: str, *, kind: str = "", num_tokens: int = 0) -> Iterator[None]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(self._compute)
        try:
            yield
        finally:
            end.record(self._compute)
            self._keep(_OpenSpan(start, end, "accelerator", name, kind, num_tokens=num_tokens))

    def _keep(self, span: _OpenSpan) -> None:
        if self.recorder.enabled:
            with self._spans_lock:
                self._spans.append(span)

    def _compare_clocks(self) -> tuple[torch.cuda.Event, float]:
        """One moment on both clocks: an event of the device and the recorder's seconds."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._clock)
        event.synchronize()
        return event, self.recorder.now_s()

    def _resolve_spans(self) -> None:
        """Records the spans that have ended, up to the first that has not."""
        with self._spans_lock:
            while self._spans and self._spans[0].end.query():
                span = self._spans.popleft()
                anchor, anchor_s = self._anchor
                start_s = max(0.0, anchor_s + anchor.elapsed_time(span.start) * 1e-3)
                end_s = max(start_s, anchor_s + anchor.elapsed_time(span.end) * 1e-3)
                self.recorder.add(
                    span.lane,
                    span.name,
                    start_s,
                    end_s,
                    kind=span.kind,
                    num_bytes=span.num_bytes,
                    num_tokens=span.num_tokens,
                )
            if self.recorder.now_s() - self._anchor[1] > _CLOCK_VALID_S:
                self._anchor = self._compare_clocks()
