"""Seconds of work that goes on, on a device whose processor is taken away and given back.

Under a quota (1 ms in 2.2 ms, say) a single run may see no pause or two: only many periods in a row say what work
takes. So totals are divided, and nothing is the fastest or the median.
"""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST_S = 0.05
"""Twenty periods and more of the quotas that a testbed uses."""


def steady_s(task: Callable[[], object], *, least_s: float = LEAST_S, least_runs: int = 2) -> float:
    """Mean seconds of ``task()``: one warm-up, then runs until both have been reached. Blocks."""
    task()
    num_runs = 0
    start_s = time.perf_counter()
    while True:
        task()
        num_runs += 1
        total_s = time.perf_counter() - start_s
        if total_s >= least_s and num_runs >= least_runs:
            return total_s / num_runs
