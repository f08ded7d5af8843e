"""A clock in the place of time: threads are greenlets that run one after the other, and what they wait for or compute
takes seconds of the clock.

Everything happens in the order of time, of equal times in the order in which it was asked for: the same input gives the
same schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import greenlet

from isthmus.simulation.tuning.events import Events
from isthmus.spec.profile import Slowdown

_LEAST_S = 1e-9
"""Less work than that is done."""
NONE = Slowdown()


class Clock:
    """Threads and what they wait for. All of them end, or wait for ever, within ``run``."""

    def __init__(self) -> None:
        self._events = Events()
        self._hub = greenlet.getcurrent()

    @property
    def now_s(self) -> float:
        return self._events.now_s

    def start(self, task: Callable[[], object]) -> None:
        """A thread that runs ``task``."""
        self.resume(greenlet.greenlet(task, parent=self._hub))

    def run(self) -> None:
        """Until nothing is left to happen. From where the clock was made. Raises what a thread raises."""
        self._events.run()

    def at(self, time_s: float, action: Callable[..., object], *arguments: object) -> None:
        self._events.at(max(time_s, self.now_s), action, *arguments)  # type: ignore[arg-type]

    def pause(self) -> None:
        """The calling thread stops until it is resumed."""
        self._hub.switch()

    def resume(self, thread: greenlet.greenlet) -> None:
        self.at(self.now_s, thread.switch)

    def sleep_until(self, time_s: float) -> None:
        """The calling thread stops until ``time_s``."""
        if time_s > self.now_s:
            self.at(time_s, greenlet.getcurrent().switch)
            self.pause()


class Happening:
    """Something that happens once: an event of a copy engine, or the future of a task."""

    def __init__(self, clock: Clock, *, has_happened: bool = False) -> None:
        self._clock = clock
        self._waiting: list[greenlet.greenlet] = []
        self._has_happened = has_happened

    def happen(self) -> None:
        self._has_happened = True
        waiting, self._waiting = self._waiting, []
        for thread in waiting:
            self._clock.resume(thread)

    def is_done(self) -> bool:
        return self._has_happened

    done = is_done

    def wait(self) -> None:
        """The calling thread stops until it has happened."""
        if not self._has_happened:
            self._waiting.append(greenlet.getcurrent())
            self._clock.pause()

    def result(self, timeout: float | None = None) -> None:
        self.wait()


class Changes:
    """Has the methods of a ``threading.Condition``. Only one thread runs at a time, so there is nothing to lock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._next = Happening(clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def wait(self, timeout: float | None = None) -> bool:
        self._next.wait()
        return True

    def notify_all(self) -> None:
        happened, self._next = self._next, Happening(self._clock)
        happened.happen()


class _Load:
    __slots__ = ("left_s", "num_threads", "slowdown", "thread")

    def __init__(self, thread: greenlet.greenlet, seconds: float, num_threads: int, slowdown: Slowdown) -> None:
        self.thread = thread
        self.left_s = seconds
        self.num_threads = num_threads
        self.slowdown = slowdown

    def rate(self, share: float, is_alone: bool) -> float:
        """Seconds of work a second, with ``share`` of the cores it wants."""
        return share / (self.slowdown.alone if is_alone else self.slowdown.beside)


class Cores:
    """Cores that threads share equally: where more want to compute than there are, all become slower alike. They are
    also slower by what they do to one another's caches and locks."""

    def __init__(self, clock: Clock, number: int) -> None:
        self._clock = clock
        self._number = number
        self._loads: list[_Load] = []
        self._since_s = 0.0
        self._version = 0

    def work(self, seconds: float, num_threads: int = 1, slowdown: Slowdown = NONE) -> None:
        """The calling thread computes what by itself takes ``seconds`` on ``num_threads`` cores of its own."""
        if seconds > 0:
            self._settle()
            self._loads.append(_Load(greenlet.getcurrent(), seconds, num_threads, slowdown))
            self._plan()
            self._clock.pause()

    def _rate(self, load: _Load) -> float:
        share = min(1.0, self._number / sum(other.num_threads for other in self._loads))
        return load.rate(share, len(self._loads) == 1)

    def _settle(self) -> None:
        now_s = self._clock.now_s
        for load in self._loads:
            load.left_s -= (now_s - self._since_s) * self._rate(load)
        self._since_s = now_s

    def _plan(self) -> None:
        self._version += 1
        if self._loads:
            soonest_s = min(load.left_s / self._rate(load) for load in self._loads)
            self._clock.at(self._clock.now_s + max(0.0, soonest_s), self._end, self._version)

    def _end(self, version: int) -> None:
        if version != self._version:
            return
        self._settle()
        ended = [load for load in self._loads if load.left_s <= _LEAST_S]
        self._loads = [load for load in self._loads if load.left_s > _LEAST_S]
        self._plan()
        for load in ended:
            self._clock.resume(load.thread)
