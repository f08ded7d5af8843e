"""Links, PCIe roots and host memory: media that what goes through them at once shares equally (processor sharing), so a
copy becomes slower while others run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

from isthmus.simulation.tuning.events import Events


class Medium:
    """``capacity``: how many flows it carries at their full rate."""

    __slots__ = ("_capacity", "active", "share")

    def __init__(self, capacity: float) -> None:
        self._capacity = capacity
        self.share = min(1.0, capacity)
        """Of its full rate that every flow under way has, or the first will have."""
        self.active: dict[Flow, None] = {}

    def divide(self, num_flows: int) -> None:
        """Among so many. Those under way are retimed; one that is about to begin is not among them yet."""
        share = self._capacity / num_flows if num_flows > self._capacity else 1.0
        if share != self.share:
            self.share = share
            for flow in self.active:
                flow.retime()


class Links(NamedTuple):
    """The media of a device's link, one direction each."""

    h2d: tuple[Medium, ...]
    d2h: tuple[Medium, ...]


class Flow:
    """Carries one thing at a time at the rate that its media leave it.

    A flow that is slowed down keeps the event that it has in the clock, which finds that it came too early and asks
    again: what is slowed is mostly hastened before.
    """

    __slots__ = ("_asked_s", "_due_s", "_events", "_left_s", "_media", "_rate", "_since_s")

    def __init__(self, events: Events, media: tuple[Medium, ...]) -> None:
        self._events = events
        self._media = media
        self._since_s = self._left_s = 0.0
        self._rate = 1.0
        self._due_s = 0.0
        self._asked_s = inf
        """When the event comes that counts, if there is one; those that come at other times are void."""

    def retime(self) -> None:
        """The media's shares have changed."""
        left_s = self._left_s - (self._events.now_s - self._since_s) * self._rate
        self._schedule(left_s if left_s > 0.0 else 0.0)

    def _schedule(self, left_s: float) -> None:
        """What is under way lands after ``left_s`` seconds at the full rate."""
        now_s, rate = self._events.now_s, 1.0
        for medium in self._media:
            if medium.share < rate:
                rate = medium.share
        self._since_s, self._left_s, self._rate = now_s, left_s, rate
        due_s = self._due_s = now_s + left_s / rate
        if due_s < self._asked_s:
            self._asked_s = due_s
            self._events.at(due_s, self._landed)

    def _join(self, seconds: float) -> None:
        """Begins what takes ``seconds`` at the full rate; nothing was under way."""
        for medium in self._media:
            active = medium.active
            if active:
                medium.divide(len(active) + 1)
            active[self] = None
        self._schedule(seconds)

    def _leave(self) -> None:
        """Nothing more is under way."""
        for medium in self._media:
            active = medium.active
            del active[self]
            if active:
                medium.divide(len(active))

    def _ask_again(self, now_s: float) -> None:
        """Nothing has landed at the event: it is void, or came too early."""
        if now_s == self._asked_s:
            self._asked_s = self._due_s
            self._events.at(self._due_s, self._landed)

    def _landed(self) -> None:
        """The event: what follows if it is the one that was asked for, and due."""
        raise NotImplementedError


class Relay(Flow):
    """What an accelerator sends another, or gets from it, one after the other: kernels, so no copy engine."""

    __slots__ = ("_arguments", "_is_busy", "_then", "_waiting")

    def __init__(self, events: Events, media: tuple[Medium, ...]) -> None:
        super().__init__(events, media)
        self._waiting: deque[tuple[float, Callable[..., None], tuple[Any, ...]]] = deque()
        self._is_busy = False
        self._then: Callable[..., None]
        self._arguments: tuple[Any, ...]

    def send(self, seconds: float, then: Callable[..., None], *arguments: Any) -> None:
        """``then(*arguments)`` when what takes ``seconds`` at the full rate is there."""
        if self._is_busy:
            self._waiting.append((seconds, then, arguments))
            return
        self._is_busy = True
        self._then, self._arguments = then, arguments
        self._join(seconds)

    def _landed(self) -> None:
        now_s = self._events.now_s
        if now_s != self._asked_s or now_s < self._due_s:
            self._ask_again(now_s)
            return
        then, arguments = self._then, self._arguments
        self._asked_s = inf
        if self._waiting:
            seconds, self._then, self._arguments = self._waiting.popleft()
            self._schedule(seconds)
        else:
            self._is_busy = False
            self._leave()
        then(*arguments)
