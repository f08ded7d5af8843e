"""The threads behind copies: one per direction, which runs jobs in order and tells who waits for them.

Urgent jobs (a few tokens that compute waits for) go ahead of the others, and a long job lets them in where it can
pause.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]
Ended = Callable[[BaseException | None], object]


class CopyEvent:
    """The end of one copy, or (made with ``happened_s``) a point that has passed already."""

    __slots__ = ("_error", "_happened", "at_s", "name")

    def __init__(self, name: str, happened_s: float | None = None) -> None:
        self.name = name
        self.at_s = 0.0
        """When it happened, seconds on the recorder's clock; may lie before the moment at which a thread noticed."""
        self._happened = threading.Event()
        self._error: BaseException | None = None
        if happened_s is not None:
            self.happen(happened_s)

    def happen(self, at_s: float, error: BaseException | None = None) -> None:
        self.at_s = at_s
        self._error = error
        self._happened.set()

    def is_done(self) -> bool:
        return self._happened.is_set()

    def wait(self) -> None:
        self._happened.wait()
        if self._error is not None:
            raise RuntimeError(f"copy {self.name!r} failed: {self._error}") from self._error


def _nothing() -> None:
    pass


def _nobody(error: BaseException | None) -> None:
    pass


class CopyEngine:
    """Runs jobs one at a time, urgent ones first, each kind in the order of ``submit``. The thread starts with the
    first job."""

    def __init__(self, name: str) -> None:
        self.error: BaseException | None = None
        """The first error that a job, or somebody told of its end, has raised."""
        self._name = name
        self._jobs: queue.SimpleQueue[tuple[Job, Ended] | None] = queue.SimpleQueue()
        """An entry per job; urgent ones stand in ``_urgent`` and have an empty entry here, to wake the thread."""
        self._urgent: deque[tuple[Job, Ended]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def submit(self, job: Job, ended: Ended, *, is_urgent: bool = False) -> None:
        """Queues ``job``; afterwards ``ended`` gets its error or None, on the engine's thread. Raises once closed."""
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the accelerator is closed")
            if is_urgent:
                self._urgent.append((job, ended))
            self._jobs.put((_nothing, _nobody) if is_urgent else (job, ended))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def drain(self) -> None:
        """Blocks until all jobs submitted so far have ended. Raises the first error there was."""
        with self._lock:
            is_running = self._thread is not None and not self._is_closed
        if is_running:
            passed = threading.Event()
            self.submit(lambda: None, lambda error: passed.set())
            passed.wait()
        if self.error is not None:
            raise RuntimeError(f"a copy failed: {self.error}") from self.error

    def close(self) -> None:
        """Ends the thread after the job it is at; those behind it end with an error instead. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._jobs.put(None)
        if self._thread is not None:
            self._thread.join()

    def let_urgent_in(self) -> None:
        """Runs the urgent jobs that wait. For a long job to call, on the engine's thread, where it can be
        interrupted."""
        while self._urgent:
            error = self._perform(*self._urgent.popleft())
            self.error = self.error or error

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            self.let_urgent_in()
            error = self._perform(*item)
            self.error = self.error or error
            # An idle engine must not keep the last copy's tensors alive.
            del item, error

    def _perform(self, job: Job, ended: Ended) -> BaseException | None:
        error: BaseException | None = None
        try:
            if self._is_closed:
                raise RuntimeError("the accelerator was closed before the copy started")
            job()
        except Exception as caught:
            error = caught
        try:
            ended(error)
        except Exception as caught:
            error = error or caught
        return error
