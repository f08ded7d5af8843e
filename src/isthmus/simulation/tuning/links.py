"""Links between host and accelerator memory: copy engines, one for each direction, and the media that they share.

A copy engine carries one copy at a time. Copies of weights come from the loader's queues (``planning/loading.py``),
most urgent first, with at most a window of them launched. What a computation waits for (tokens) is launched before any
of them, as soon as the piece that is under way has landed: a unit's whole weights as published, 16 MiB in our runtime
(``tuning/accelerator/cuda.py``). Engines that are at work at once share a link, a PCIe root and the host memory's
bandwidth equally (processor sharing), so a copy becomes slower while others run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum
from math import ceil
from typing import Any, NamedTuple

from isthmus.planning.loading import LoadQueues, Phase, Verdict
from isthmus.simulation.tuning.events import Events, Lane
from isthmus.spec.model import UnitKey


class Medium:
    """What several copy engines share. ``capacity``: how many of them it carries at their full rate."""

    __slots__ = ("_active", "_capacity", "share")

    def __init__(self, capacity: float) -> None:
        self._capacity = capacity
        self.share = 1.0
        """Of its full rate that every engine at work has."""
        self._active: dict[CopyEngine, None] = {}

    def join(self, engine: CopyEngine) -> None:
        """``engine`` is about to begin; those at work already are slowed."""
        active = self._active
        num_engines = len(active) + 1
        share = self._capacity / num_engines if num_engines > self._capacity else 1.0
        if share != self.share:
            self._divide(share)
        active[engine] = None

    def leave(self, engine: CopyEngine) -> None:
        active = self._active
        del active[engine]
        num_engines = len(active)
        share = self._capacity / num_engines if num_engines > self._capacity else 1.0
        if share != self.share:
            self._divide(share)

    def _divide(self, share: float) -> None:
        self.share = share
        for engine in self._active:
            engine.retime()


class Links(NamedTuple):
    """The media of a device's link, one direction each."""

    h2d: tuple[Medium, ...]
    d2h: tuple[Medium, ...]


class Urgency(IntEnum):
    """Which copy an engine carries next."""

    AHEAD = 0
    """A computation waits for it."""
    WEIGHTS = 1
    LATER = 2
    """Nothing waits for it: gradients."""


class Copy:
    """``then(*arguments)`` is called when it has landed. ``seconds``: at the engine's full rate. ``first_s``,
    ``piece_s``: of its pieces, between which what is urgent goes first; 0: it is one piece."""

    __slots__ = (
        "arguments",
        "first_s",
        "kind",
        "name",
        "num_bytes",
        "num_tokens",
        "piece_s",
        "seconds",
        "then",
        "urgency",
    )

    def __init__(
        self,
        seconds: float,
        then: Callable[..., None] | None,
        arguments: tuple[Any, ...] = (),
        kind: str = "tokens",
        name: str = "",
        num_bytes: int = 0,
        num_tokens: int = 0,
        urgency: Urgency = Urgency.AHEAD,
        first_s: float = 0.0,
        piece_s: float = 0.0,
    ) -> None:
        self.seconds = seconds
        self.then = then
        self.arguments = arguments
        self.kind = kind
        self.name = name
        self.num_bytes = num_bytes
        self.num_tokens = num_tokens
        self.urgency = urgency
        self.first_s = first_s
        self.piece_s = piece_s

    def end_of_piece(self, done_s: float) -> float:
        """When the piece that is under way ends, in seconds of the copy."""
        if not self.piece_s:
            return self.seconds
        return self.first_s + max(0, ceil((done_s - self.first_s) / self.piece_s - 1e-9)) * self.piece_s

    def cut(self, at_s: float) -> Copy:
        """Keeps what comes before ``at_s`` and returns the rest, which tells that all has landed."""
        num_bytes = round(self.num_bytes * at_s / self.seconds)
        rest = Copy(
            self.seconds - at_s,
            self.then,
            self.arguments,
            self.kind,
            self.name,
            self.num_bytes - num_bytes,
            urgency=self.urgency,
            first_s=self.piece_s,
            piece_s=self.piece_s,
        )
        self.seconds, self.num_bytes, self.then = at_s, num_bytes, None
        return rest


class CopyEngine:
    """One direction of one accelerator's link."""

    _refills = False
    """Whether a copy that has landed lets others be launched (``_pull_ahead``)."""

    __slots__ = (
        "_began_s",
        "_current",
        "_events",
        "_left_s",
        "_media",
        "_queues",
        "_rate",
        "_since_s",
        "_version",
        "_window",
        "lane",
    )

    def __init__(self, events: Events, lane: Lane, media: tuple[Medium, ...], window: int) -> None:
        self._events = events
        self.lane = lane
        self._media = media
        self._window = window
        self._queues: tuple[deque[Copy], ...] = tuple(deque() for _ in Urgency)
        self._current: Copy | None = None
        self._began_s = self._since_s = self._left_s = 0.0
        self._rate = 1.0
        self._version = 0

    def send(self, copy: Copy) -> None:
        """Queues ``copy`` by its urgency."""
        if self._current is None:
            self._begin(copy)
            return
        self._queues[copy.urgency].append(copy)
        if copy.urgency is Urgency.AHEAD and self._current.piece_s:
            self._interrupt(self._current)

    def _pull_ahead(self) -> None:
        """A copy has landed: others may be launched."""

    def retime(self) -> None:
        """The media's shares have changed."""
        now_s = self._events.now_s
        self._left_s -= (now_s - self._since_s) * self._rate
        self._schedule(now_s, max(0.0, self._left_s))

    def _schedule(self, now_s: float, left_s: float) -> None:
        """The present copy lands after ``left_s`` seconds at its full rate."""
        rate = 1.0
        for medium in self._media:
            if medium.share < rate:
                rate = medium.share
        self._since_s, self._left_s, self._rate = now_s, left_s, rate
        self._version += 1
        self._events.at(now_s + left_s / rate, self._landed, self._version)

    def _interrupt(self, copy: Copy) -> None:
        """Something urgent goes first after the present piece."""
        now_s = self._events.now_s
        done_s = copy.seconds - self._left_s + (now_s - self._since_s) * self._rate
        end_s = copy.end_of_piece(done_s)
        if end_s < copy.seconds * (1 - 1e-9):
            self._queues[copy.urgency].appendleft(copy.cut(end_s))
            self._schedule(now_s, max(0.0, end_s - done_s))

    def _begin(self, copy: Copy) -> None:
        """Carries ``copy``; nothing was under way."""
        self._current = copy
        for medium in self._media:
            medium.join(self)
        now_s = self._began_s = self._events.now_s
        self._schedule(now_s, copy.seconds)

    def _landed(self, version: int) -> None:
        if version != self._version:
            return
        events, lane, copy = self._events, self.lane, self._current
        assert copy is not None
        now_s = events.now_s
        if lane.spans is None:
            lane.busy_s = lane.busy_s + now_s - self._began_s
            lane.num_bytes += copy.num_bytes
        else:
            lane.add(copy.kind, copy.name, self._began_s, now_s, copy.num_bytes, copy.num_tokens)
        if self._refills:
            self._pull_ahead()
        ahead, weights, later = self._queues
        queue = ahead or weights or later
        if queue:
            # At the rate of the one before: whoever joins or leaves the media retimes what is under way.
            following = self._current = queue.popleft()
            self._began_s = self._since_s = now_s
            self._left_s = following.seconds
            self._version = version = version + 1
            events.at(now_s + following.seconds / self._rate, self._landed, version)
        else:
            self._current = None
            for medium in self._media:
                medium.leave(self)
        if copy.then is not None:
            copy.then(*copy.arguments)


class Loader(CopyEngine):
    """The copy engine to the accelerator, with what is there. ``there``: the units whose weights have landed, and
    when."""

    _refills = True
    __slots__ = ("_cost", "_experts", "_found", "_launched", "_on_landed", "on_way", "queues", "there")

    def __init__(
        self,
        events: Events,
        lane: Lane,
        media: tuple[Medium, ...],
        window: int,
        cost: Callable[[UnitKey], tuple[float, int, float]],
        on_landed: Callable[[UnitKey], None],
    ) -> None:
        """``cost(key)``: (seconds at full rate, bytes, seconds of a piece or 0) of a unit's weights. ``on_landed(key)``
        is called when they are there."""
        super().__init__(events, lane, media, window)
        self.queues = LoadQueues()
        self._launched = self._queues[Urgency.WEIGHTS]
        self.there: dict[UnitKey, float] = {}
        self.on_way: dict[UnitKey, None] = {}
        self._experts: dict[int, list[int]] = {}
        self._cost = cost
        self._on_landed = on_landed
        self._found: UnitKey | None = None

    def refill(self) -> None:
        """Launches copies of weights up to the window."""
        launched = self._launched
        is_idle = self._current is None
        while len(launched) + (not is_idle) < self._window:
            if not self._pull():
                break
        if is_idle and launched:
            self._begin(launched.popleft())

    def _pull_ahead(self) -> None:
        launched = self._launched
        while len(launched) < self._window and self._pull():
            pass

    def _pull(self) -> bool:
        """Launches one more copy of weights, if any is wanted."""
        if not self.queues.take(self._ask):
            return False
        key = self._found
        assert key is not None
        self.on_way[key] = None
        if key.expert >= 0:
            self._experts.setdefault(key.layer, []).append(key.expert)
        kind = "load_expert" if key.expert >= 0 else "load_dense"
        name = "" if self.lane.spans is None else f"load L{key.layer}" + f" E{key.expert}" * (key.expert >= 0)
        seconds, num_bytes, piece_s = self._cost(key)
        self._launched.append(
            Copy(seconds, self._arrived, (key,), kind, name, num_bytes, 0, Urgency.WEIGHTS, piece_s, piece_s)
        )
        return True

    def _ask(self, phase: Phase, key: UnitKey) -> Verdict:
        if key in self.there or key in self.on_way:
            return Verdict.SKIP
        self._found = key
        return Verdict.TAKE

    def _arrived(self, key: UnitKey) -> None:
        if key in self.on_way:
            del self.on_way[key]
            self.there[key] = self._events.now_s
            self._on_landed(key)

    def experts_of(self, layer: int) -> list[int]:
        """That are there or on their way."""
        return self._experts.get(layer, [])

    def forget(self, layers: set[int]) -> None:
        """Everything of other layers leaves the accelerator; what is on its way is of no use when it lands."""
        for kept in (self.there, self.on_way):
            for key in [key for key in kept if key.layer not in layers]:
                del kept[key]
        for layer in [layer for layer in self._experts if layer not in layers]:
            del self._experts[layer]
