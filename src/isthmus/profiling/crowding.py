"""How much longer things take in the middle of a step than measured by themselves: caches hold something else, and the
process's other thread computes too, which takes memory's bandwidth and the interpreter's lock."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from isthmus.profiling.timing import median_s
from isthmus.spec.profile import Slowdown

FORGOTTEN_BYTES = 48 << 20
"""Written between two measurements: more than the caches hold that a core has for itself."""
REPEATS = 12
BUDGET_S = 1.0


class Interruption(Protocol):
    """Something else that comes before or in the middle of what is measured, in the pass that is named."""

    spent_s: float
    """What it has taken so far: nobody's whose seconds are measured."""

    def __call__(self, *, is_backward: bool = False) -> None: ...


class Forgetting:
    """An ``Interruption`` that leaves nothing of use in the caches."""

    def __init__(self) -> None:
        self._memory = torch.ones(FORGOTTEN_BYTES, dtype=torch.uint8)
        self.spent_s = 0.0

    def __call__(self, *, is_backward: bool = False) -> None:
        start_s = time.perf_counter()
        self._memory.add_(1)
        self.spent_s += time.perf_counter() - start_s


@contextmanager
def busy(task: Callable[[], object], *, num_threads: int) -> Iterator[None]:
    """Another thread repeats ``task`` meanwhile."""
    is_over, error = threading.Event(), []

    def run() -> None:
        torch.get_num_threads()  # a new thread's first operator would otherwise undo what is set here
        torch.set_num_threads(num_threads)
        try:
            while not is_over.is_set():
                task()
        except BaseException as caught:
            error.append(caught)

    thread = threading.Thread(target=run, name="isthmus-profile-busy")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    if error:
        raise error[0]


def usual_s(task: Callable[[], object], interrupt: Interruption, now_s: Callable[[], float] | None = None) -> float:
    """The median of some runs, each after an interruption, which leaves something else in the caches; those that the
    task itself makes do not count. Blocks for a second."""
    now_s = now_s or time.perf_counter
    task()
    seconds: list[float] = []
    end_s = time.perf_counter() + BUDGET_S
    while len(seconds) < REPEATS and (len(seconds) < 3 or time.perf_counter() < end_s):
        interrupt()
        start_s, before_s = now_s(), interrupt.spent_s
        task()
        seconds.append(now_s() - start_s - (interrupt.spent_s - before_s))
    return statistics.median(seconds)


def measure_slowdown(
    task: Callable[[], object],
    other: Callable[[], object] | None,
    *,
    num_threads: int = 1,
    takes_turns: bool = False,
) -> Slowdown:
    """Of ``task`` beside ``other`` on ``num_threads`` threads (None: there is no other thread), in multiples of what it
    takes by itself, which is measured before and after. Where it ``takes_turns`` with the other on a core, the other's
    turns do not count, but that it leaves the caches otherwise. Never below 1. Blocks for seconds."""
    forget, by_itself_s = Forgetting(), [median_s(task)]

    def times_as_long(seconds: float) -> float:
        by_itself_s.append(median_s(task))
        return seconds / statistics.fmean(by_itself_s[-2:])

    alone = max(1.0, times_as_long(usual_s(task, forget)))
    if other is None:
        return Slowdown(alone=alone, beside=alone)
    with busy(other, num_threads=num_threads):
        seconds = usual_s(task, forget, time.thread_time if takes_turns else None)
    return Slowdown(alone=alone, beside=max(alone, times_as_long(seconds)))
