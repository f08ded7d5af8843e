"""Owns how much host memory this process uses, now and at most."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


def resident_bytes() -> int:
    """Bytes of physical memory this process has mapped now, shared pages included."""
    return psutil.Process().memory_info().rss


class PeakHostMemory:
    """Samples ``resident_bytes`` from a thread while the ``with`` block runs; ``peak_bytes`` is the most seen so far.

    Sampling, not the kernel's high-water mark (``VmHWM``), because that one covers the process's whole life, imports
    and earlier runs included, and can only be reset through a file that is not always writable. A peak shorter than
    ``interval_s`` may be missed. Can be entered again; each block starts anew.
    """

    def __init__(self, interval_s: float = 0.05) -> None:
        if not interval_s > 0:
            raise ValueError(f"interval_s is {interval_s}, wanted more than 0 seconds, such as 0.05")
        self.peak_bytes = 0
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakHostMemory:
        if self._thread is not None:
            raise RuntimeError("PeakHostMemory is already sampling: make another one to sample inside its block")
        self.peak_bytes = resident_bytes()
        self._ended.clear()
        self._thread = threading.Thread(target=self._sample, name="isthmus-host-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None
        self._ended.set()
        self._thread.join()
        self._thread = None
        self.peak_bytes = max(self.peak_bytes, resident_bytes())

    def _sample(self) -> None:
        while not self._ended.wait(self._interval_s):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())
