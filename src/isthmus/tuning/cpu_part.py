"""The CPU's part of a pass: the way of its rows to the host, its task there, and the way of the results back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future

import torch
from torch import Tensor

from isthmus.tuning.accelerator.base import Accelerator, Event
from isthmus.tuning.cpu_worker import CpuWorker
from isthmus.tuning.host_buffers import HostBuffers

_SHORTEST_WAIT_S = 50e-6

Task = Callable[[], list[tuple[Tensor, Tensor]]]
"""Runs once the rows are on the host; returns (host result, its place on the accelerator) pairs."""


class CpuPart:
    """One trip, as the computing thread sees it: ``lend`` buffers for rows and results, ``start``, ``join``."""

    def __init__(
        self, accelerator: Accelerator, worker: CpuWorker | None, buffers: HostBuffers, *, priority: float, name: str
    ) -> None:
        """``worker`` None: there will be no trip."""
        self.accelerator = accelerator
        self.worker = worker
        self.buffers = buffers
        self.priority = priority
        self.name = name
        self._done: Future | None = None
        self._landed: Event | None = None
        self._lent: list[Tensor] = []

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A host buffer until the results have travelled back."""
        buffer = self.buffers.take(shape, dtype)
        self._lent.append(buffer)
        return buffer

    def start(
        self,
        rows: Sequence[tuple[Tensor, Tensor]],
        task: Task,
        *,
        kind: str,
        num_tokens: int,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Brings ``rows``, (on the accelerator, host buffer) pairs, to the host and then runs ``task()`` on the CPU,
        whose results travel back. Once they have left, the CPU runs ``then()``. Does not block."""
        worker, accelerator = self.worker, self.accelerator
        assert worker is not None
        free = accelerator.record()
        done = self._done = Future()

        def run() -> None:
            for event in arrived:
                event.wait()
            self._send_back(task(), after=free)
            then()

        def submit() -> None:
            try:
                inner = worker.submit(run, priority=self.priority, name=self.name, kind=kind, num_tokens=num_tokens)
                inner.add_done_callback(lambda future: _pass_on(future, done))
            except BaseException as error:
                done.set_exception(error)
                raise

        arrived: list[Event] = []
        # Copies of one direction end in order: the last one's end says that all have arrived.
        for number, (part, host) in enumerate(rows, start=1):
            event = accelerator.copy(
                host,
                part,
                "d2h",
                name=f"{self.name} tokens",
                kind="tokens",
                after=free,
                is_urgent=True,
                on_done=submit if number == len(rows) else None,
            )
            arrived.append(event)

    def _send_back(self, results: list[tuple[Tensor, Tensor]], *, after: Event) -> None:
        for number, (host, place) in enumerate(results, start=1):
            self._landed = self.accelerator.copy(
                place,
                host,
                "h2d",
                name=f"{self.name} results",
                kind="tokens",
                after=after,
                is_urgent=True,
                # Copies of one direction end in order: after the last one nothing reads the buffers any more.
                on_done=self._give_back if number == len(results) else None,
            )

    def _give_back(self) -> None:
        for buffer in self._lent:
            self.buffers.give(buffer)

    def is_done(self) -> bool:
        """Whether ``join`` would not block."""
        return self._done is None or self._done.done()

    def join(self) -> None:
        """Makes compute wait for the results, if a trip was started. Blocks until the CPU has ended, not until they
        have landed. Raises what the task raised."""
        if self._done is None:
            return
        recorder = self.accelerator.recorder
        start_s = recorder.now_s()
        self._done.result()
        if recorder.now_s() - start_s > _SHORTEST_WAIT_S:
            recorder.add("accelerator", f"{self.name}: CPU experts", start_s, recorder.now_s(), kind="wait")
        assert self._landed is not None
        self.accelerator.wait_for(self._landed)
        self._done = None


def _pass_on(inner: Future, outer: Future) -> None:
    error = CancelledError() if inner.cancelled() else inner.exception()
    if error is not None:
        outer.set_exception(error)
    else:
        outer.set_result(None)
