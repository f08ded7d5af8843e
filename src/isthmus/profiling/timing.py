"""How seconds are measured: warmed up, repeated within a time budget, the median taken. A step meets the machine as it
usually is: on a virtual machine the luckiest of some runs takes 0.8 to 0.96 of what they take on average.

A process that is held to a part of its cores' time pauses every few milliseconds. There a run is repeated until several
pauses are in it, and counts as what it takes on average.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from isthmus.planning.curves import monotone
from isthmus.profiling.limits import cpu_quota
from isthmus.profiling.steady import mean_s
from isthmus.spec.profile import Curve

Result = TypeVar("Result")

PERIODS = 12
LONGEST_WINDOW_S = 0.1
NUM_ROUNDS, RUNS_OF_ROUND, ROUND_S = 3, 5, 0.1


def median_s(task: Callable[[], object], *, repeats: int = 9, budget_s: float = 0.3) -> float:
    """Seconds of ``task()``, the median: one warm-up, then up to ``repeats`` runs (at least one) within about
    ``budget_s``. Blocks."""
    return statistics.median(samples_s(task, repeats=repeats, budget_s=budget_s))


def samples_s(task: Callable[[], object], *, repeats: int, budget_s: float) -> list[float]:
    """As ``median_s``, of each run."""
    task()
    seconds: list[float] = []
    window_s = window_of_pauses_s(cpu_quota(), torch.get_num_threads())
    end_s = time.perf_counter() + budget_s
    while len(seconds) < repeats and (not seconds or time.perf_counter() < end_s):
        seconds.append(mean_s(task, window_s))
    return seconds


def window_of_pauses_s(quota: tuple[int, int] | None, num_threads: int) -> float:
    """How long a run has to be repeated under this quota (microseconds of computing, of a period) for its pauses to be
    in it as they are in the long run; 0 where so many threads make none."""
    if quota is None or quota[0] >= num_threads * quota[1]:
        return 0.0
    return min(PERIODS * quota[1] * 1e-6, LONGEST_WINDOW_S)


def token_grid(largest: int) -> list[int]:
    """1, 2, 4, … up to and including ``largest``."""
    grid = [1]
    while grid[-1] * 2 < largest:
        grid.append(grid[-1] * 2)
    return grid if largest == 1 else [*grid, largest]


def measure_curve(task: Callable[[int], Callable[[], object]], grid: Iterable[int], *, longest_s: float = 1.0) -> Curve:
    """Seconds of ``task(num_tokens)()`` over the grid. Stops after the first point above ``longest_s``: beyond, a curve
    is a line.

    In rounds, since a machine is faster in one second and slower in another; points that take long have one. Noise may
    make a measured curve fall; more tokens never take less, so the nearest curve that does not fall is returned.
    """
    found: dict[int, list[float]] = {}
    for count in grid:
        found[count] = samples_s(task(count), repeats=RUNS_OF_ROUND, budget_s=ROUND_S)
        if found[count][-1] > longest_s:
            break
    for _ in range(NUM_ROUNDS - 1):
        for count, seconds in found.items():
            if sum(seconds) < ROUND_S:
                seconds += samples_s(task(count), repeats=RUNS_OF_ROUND, budget_s=ROUND_S)
    medians = tuple(statistics.median(seconds) for seconds in found.values())
    return monotone(Curve(num_tokens=tuple(found), seconds=medians))


def in_thread(task: Callable[[], Result], *, num_threads: int) -> Result:
    """Runs ``task`` in a fresh thread whose PyTorch operators use ``num_threads`` cores; returns its result or raises
    its error."""
    outcome: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        torch.get_num_threads()  # a new thread's first operator would otherwise undo what is set here
        torch.set_num_threads(num_threads)
        try:
            outcome.append(task())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="isthmus-profile")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return outcome[0]
