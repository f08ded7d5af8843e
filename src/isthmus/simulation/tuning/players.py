"""Plays the steps of a simulation. What a step leaves to the next is known before it is played, so steps wait for
nothing of one another: where many are left they are played by processes of their own, one for each core.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread
from time import perf_counter
from types import TracebackType

from isthmus.simulation.tuning.candidates import Make
from isthmus.simulation.tuning.costs import Costs
from isthmus.simulation.tuning.pipeline import StepResult, simulate_step
from isthmus.simulation.tuning.policies import Counts
from isthmus.simulation.tuning.work import Backlog, StepWork
from isthmus.spec.errors import IsthmusError
from isthmus.spec.plan import Stage

BEGIN_S = 0.5
"""What processes need to begin: none is started before steps have been played for as long."""
WORTH_PROCESSES_S = 4.0
"""They are for what would take longer alone."""


class PlayerLost(IsthmusError):
    """A process that plays steps has ended."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """All that decides how a step goes. ``counts`` are real, ``expected`` what history has."""

    stages: Sequence[Stage]
    make: Make
    counts: Counts
    expected: Counts
    backlogs: Sequence[Backlog] = ()
    keeps_spans: bool = False


class Player:
    """Plays steps of one job, one after the other."""

    def __init__(self, costs: Costs) -> None:
        self._work = StepWork(costs, (), costs.order, {})

    def play(self, step: Step) -> StepResult:
        if self._work.stages != step.stages:
            self._work = StepWork(self._work.costs, step.stages, self._work.order, step.counts)
        else:
            self._work = self._work.with_counts(step.counts)
        policy = step.make(self._work, step.expected)
        return simulate_step(self._work, policy, backlogs=step.backlogs, keeps_spans=step.keeps_spans)


class Players:
    """Plays ``num_steps`` steps in all, at once where that is worth it. Results are the same either way."""

    def __init__(self, costs: Costs, num_steps: int, num_processes: int) -> None:
        """``num_processes``: that may be started; 1: none is."""
        self._costs = costs
        self._num_left, self._num_played, self._played_s = num_steps, 0, 0.0
        self._num_processes = num_processes
        self._player = Player(costs)
        self._pool: ProcessPoolExecutor | None = None
        self._playing: deque[Future[StepResult]] = deque()

    def __enter__(self) -> Players:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def play(self, step: Step) -> Future[StepResult]:
        """Blocks until the step has been played, or while others keep all processes busy."""
        self._num_left -= 1
        if self._pool is None:
            return self._play_here(step)
        while len(self._playing) >= 2 * self._num_processes:
            result_of(self._playing.popleft())
        with _broken_told():
            future = self._pool.submit(_play, step)
        self._playing.append(future)
        return future

    def _play_here(self, step: Step) -> Future[StepResult]:
        began_s = perf_counter()
        future: Future[StepResult] = Future()
        future.set_result(self._player.play(step))
        self._num_played += 1
        self._played_s += perf_counter() - began_s
        left_s = self._played_s / self._num_played * self._num_left
        if self._num_processes > 1 and self._played_s > BEGIN_S and left_s > WORTH_PROCESSES_S:
            self._pool = ProcessPoolExecutor(
                min(self._num_processes, self._num_left),
                mp_context=get_context("spawn"),
                initializer=_begin,
                initargs=(self._costs,),
            )
        return future


def result_of(future: Future[StepResult]) -> StepResult:
    """Blocks until it is there. Raises ``PlayerLost``."""
    with _broken_told():
        return future.result()


@contextmanager
def _broken_told() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise PlayerLost(
            "simulation: one of its processes has ended, killed or short of memory; "
            "wanted all to last: start it on one core (taskset -c 0 isthmus …), where it needs no other process."
        ) from error


_players: list[Player] = []
"""In a process of its own: its only one."""


def _begin(costs: Costs) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it is told, and ends it
    Thread(target=_end_with_parent, daemon=True).start()
    _players.append(Player(costs))


def _end_with_parent() -> None:
    """The pool's own processes would wait for a parent that was killed."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _play(step: Step) -> StepResult:
    return _players[0].play(step)
