"""Links between host and accelerator memory: copy engines, one for each direction, that share media (``media.py``).

A copy engine carries one copy at a time. Copies of weights come from the loader's queues (``planning/loading.py``),
most urgent first, with at most a window of them launched. What a computation waits for (tokens) is launched before any
of them, as soon as the piece that is under way has landed: a unit's whole weights as published, 16 MiB in our runtime
(``tuning/accelerator/cuda.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import IntEnum
from math import ceil, inf
from typing import Any

from isthmus.planning.loading import LoadQueues, unit_key
from isthmus.simulation.tuning.events import Events, Lane
from isthmus.simulation.tuning.media import Flow, Medium
from isthmus.spec.model import DENSE, UnitKey


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


class CopyEngine(Flow):
    """One direction of one accelerator's link."""

    _refills = False
    """Whether a copy that has landed lets others be launched (``_pull_ahead``)."""

    __slots__ = ("_began_s", "_current", "_queues", "lane")

    def __init__(self, events: Events, lane: Lane, media: tuple[Medium, ...]) -> None:
        super().__init__(events, media)
        self.lane = lane
        self._queues: tuple[deque[Copy], ...] = tuple(deque() for _ in Urgency)
        self._current: Copy | None = None
        self._began_s = 0.0

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

    def _interrupt(self, copy: Copy) -> None:
        """Something urgent goes first after the present piece."""
        now_s = self._events.now_s
        done_s = copy.seconds - self._left_s + (now_s - self._since_s) * self._rate
        end_s = copy.end_of_piece(done_s)
        if end_s < copy.seconds * (1 - 1e-9):
            self._queues[copy.urgency].appendleft(copy.cut(end_s))
            self._schedule(max(0.0, end_s - done_s))

    def _begin(self, copy: Copy) -> None:
        """Carries ``copy``; nothing was under way."""
        self._current = copy
        self._began_s = self._events.now_s
        self._join(copy.seconds)

    def _landed(self) -> None:
        now_s = self._events.now_s
        if now_s != self._asked_s or now_s < self._due_s:
            self._ask_again(now_s)
            return
        lane, copy = self.lane, self._current
        assert copy is not None
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
            self._left_s = seconds = following.seconds
            self._due_s = self._asked_s = due_s = now_s + seconds / self._rate
            self._events.at(due_s, self._landed)
        else:
            self._current = None
            self._asked_s = inf
            self._leave()
        if copy.then is not None:
            copy.then(*copy.arguments)


class Loader(CopyEngine):
    """The copy engine to the accelerator, with what is there. ``there``: the units whose weights have landed, and
    when."""

    _refills = True
    __slots__ = (
        "_costs",
        "_experts",
        "_launched",
        "_on_landed",
        "_window",
        "awaited",
        "known",
        "num_landed",
        "queues",
        "there",
    )

    def __init__(
        self,
        events: Events,
        lane: Lane,
        media: tuple[Medium, ...],
        window: int,
        costs: Mapping[int, Sequence[tuple[float, int, float]]],
        on_landed: Callable[[UnitKey], None],
        awaited: Collection[UnitKey],
    ) -> None:
        """``window``: copies of weights that are launched at a time. ``costs``: (seconds at full rate, bytes, seconds
        of a piece or 0) of a layer's dense part and of an expert. ``on_landed(key)`` is called when one of ``awaited``
        is there."""
        super().__init__(events, lane, media)
        self.queues = LoadQueues()
        self._window = window
        self._launched = self._queues[Urgency.WEIGHTS]
        self.there: dict[UnitKey, float] = {}
        self.known: dict[UnitKey, None] = {}
        """Units that are there or on their way."""
        self.num_landed = 0
        """Units that were still wanted when they had landed."""
        self._experts: dict[int, list[UnitKey]] = {}
        """By layer of which something is there or on its way."""
        self._costs = costs
        self._on_landed = on_landed
        self.awaited = awaited

    def refill(self) -> None:
        """Launches copies of weights up to the window."""
        is_idle = self._current is None
        self._launch(self._window - (not is_idle))
        if is_idle and self._launched:
            self._begin(self._launched.popleft())

    def _pull_ahead(self) -> None:
        self._launch(self._window)

    def _launch(self, most: int) -> None:
        """Launches copies of weights, if any are wanted, until ``most`` wait to be carried."""
        launched, known = self._launched, self.known
        while len(launched) < most:
            key = self.queues.take_missing(known)
            if key is None:
                return
            known[key] = None
            layer, expert = key
            is_expert = expert >= 0
            experts = self._experts.setdefault(layer, [])
            if is_expert:
                experts.append(key)
            kind = "load_expert" if is_expert else "load_dense"
            name = "" if self.lane.spans is None else f"load L{layer}" + f" E{expert}" * is_expert
            seconds, num_bytes, piece_s = self._costs[layer][is_expert]
            launched.append(
                Copy(seconds, self._arrived, (key,), kind, name, num_bytes, 0, Urgency.WEIGHTS, piece_s, piece_s)
            )

    def _arrived(self, key: UnitKey) -> None:
        if key in self.known and key not in self.there:
            self.there[key] = self._events.now_s
            self.num_landed += 1
            if key in self.awaited:
                self._on_landed(key)

    def experts_of(self, layer: int) -> list[UnitKey]:
        """That are there or on their way."""
        return self._experts.get(layer, [])

    def forget(self, layers: set[int]) -> None:
        """Everything of other layers leaves the accelerator; what is on its way is of no use when it lands."""
        there, known = self.there, self.known
        for layer in [layer for layer in self._experts if layer not in layers]:
            for key in (unit_key(layer, DENSE), *self._experts.pop(layer)):
                there.pop(key, None)
                known.pop(key, None)
