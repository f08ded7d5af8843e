"""Seconds of work that goes on, on a device whose processor is taken away and given back.

Under a quota (1 ms in 2.2 ms, say) a single run may see no pause or two: only many periods in a row say what work
takes. So totals over windows of many periods are divided, and of a few windows, between which neighbours of the machine
come and go, the median is taken.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

WINDOW_S = 0.03
"""A dozen periods of the quotas that a testbed uses."""
NUM_WINDOWS = 3


def steady_s(task: Callable[[], object], *, window_s: float = WINDOW_S) -> float:
    """Mean seconds of ``task()`` in the median window: one warm-up, then windows of at least ``window_s`` and one run.
    Blocks."""
    task()
    return statistics.median(mean_s(task, window_s) for _ in range(NUM_WINDOWS))


def mean_s(task: Callable[[], object], window_s: float) -> float:
    """Of runs that together take at least ``window_s``. Blocks."""
    num_runs = 0
    start_s = time.perf_counter()
    while True:
        task()
        num_runs += 1
        total_s = time.perf_counter() - start_s
        if total_s >= window_s:
            return total_s / num_runs
