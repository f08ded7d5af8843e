"""Links between host and accelerator memory: one copy engine per direction, and the media that they share.

A copy engine carries one copy at a time and never interrupts one. Copies of weights come from the loader's queues
(``planning/loading.py``), most urgent first, with at most a window of them launched; what a computation waits for
(tokens, activations) is launched before any of them. Engines that are at work at once share a PCIe root's and the host
memory's bandwidth equally (processor sharing), so a copy becomes slower while others run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from isthmus.planning.loading import LoadQueues, Phase, Verdict
from isthmus.simulation.tuning.events import Events, Record
from isthmus.spec.model import UnitKey


class Medium:
    """What several copy engines share. ``capacity``: how many of them it carries at their full rate."""

    __slots__ = ("_active", "capacity")

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self._active: dict[CopyEngine, None] = {}

    def share(self) -> float:
        return min(1.0, self.capacity / max(1, len(self._active)))

    def join(self, engine: CopyEngine) -> None:
        before = self.share()
        self._active[engine] = None
        self._changed(before)

    def leave(self, engine: CopyEngine) -> None:
        before = self.share()
        del self._active[engine]
        self._changed(before)

    def _changed(self, before: float) -> None:
        if self.share() != before:
            for engine in self._active:
                engine.retime()


class Copy:
    """``seconds``: at the engine's full rate."""

    __slots__ = ("kind", "name", "num_bytes", "num_tokens", "seconds", "then")

    def __init__(
        self, seconds: float, then: Callable[[], None] | None, kind: str, name: str, num_bytes: int, num_tokens: int = 0
    ) -> None:
        self.seconds = seconds
        self.then = then
        self.kind = kind
        self.name = name
        self.num_bytes = num_bytes
        self.num_tokens = num_tokens


class CopyEngine:
    """One direction of one accelerator's link."""

    def __init__(self, events: Events, record: Record, lane: str, media: tuple[Medium, ...], window: int) -> None:
        self._events = events
        self._record = record
        self._lane = lane
        # What can never be short need not be asked.
        self._media = media
        self._window = window
        self._ahead: deque[Copy] = deque()
        self._launched: deque[Copy] = deque()
        self._bulk: deque[Copy] = deque()
        self._current: Copy | None = None
        self._began_s = self._since_s = self._left_s = 0.0
        self._rate = 1.0
        self._version = 0

    def send(self, copy: Copy) -> None:
        """Something that a computation waits for."""
        self._ahead.append(copy)
        if self._current is None:
            self._start()

    def send_later(self, copy: Copy) -> None:
        """Something that nothing waits for, such as gradients."""
        self._bulk.append(copy)
        if self._current is None:
            self._start()

    def pull(self) -> Copy | None:
        """One more copy of weights, if any is wanted."""
        return None

    def refill(self) -> None:
        """Launches copies of weights up to the window."""
        launched = self._launched
        is_idle = self._current is None
        while len(launched) + (not is_idle) < self._window:
            copy = self.pull()
            if copy is None:
                break
            launched.append(copy)
        if is_idle and launched:
            self._start()

    def retime(self) -> None:
        """The media's shares have changed."""
        now_s = self._events.now_s
        self._left_s -= (now_s - self._since_s) * self._rate
        self._since_s = now_s
        rate = 1.0
        for medium in self._media:
            rate = min(rate, medium.share())
        self._rate = rate
        self._version += 1
        self._events.at(now_s + max(0.0, self._left_s) / rate, self._landed, self._version)

    def _start(self) -> None:
        """Carries the next copy, if there is one."""
        was_idle = self._current is None
        if self._ahead:
            copy = self._ahead.popleft()
        elif self._launched:
            copy = self._launched.popleft()
        elif self._bulk:
            copy = self._bulk.popleft()
        else:
            self._current = None
            if not was_idle:
                for medium in self._media:
                    medium.leave(self)
            return
        self._current = copy
        now_s = self._events.now_s
        self._began_s = self._since_s = now_s
        self._left_s = copy.seconds
        if was_idle and self._media:
            for medium in self._media:
                medium.join(self)
        self._version += 1
        rate = 1.0
        for medium in self._media:
            rate = min(rate, medium.share())
        self._rate = rate
        self._events.at(now_s + copy.seconds / rate, self._landed, self._version)

    def _landed(self, version: int) -> None:
        if version != self._version:
            return
        copy, now_s = self._current, self._events.now_s
        assert copy is not None
        self._record.add(self._lane, copy.kind, copy.name, self._began_s, now_s, copy.num_bytes, copy.num_tokens)
        while len(self._launched) < self._window:
            more = self.pull()
            if more is None:
                break
            self._launched.append(more)
        self._start()
        if copy.then is not None:
            copy.then()


class Loader(CopyEngine):
    """The copy engine to the accelerator, with what is there. ``there``: the units whose weights have landed, and
    when."""

    def __init__(
        self,
        events: Events,
        record: Record,
        media: tuple[Medium, ...],
        window: int,
        cost: Callable[[UnitKey], tuple[float, int]],
        on_landed: Callable[[UnitKey], None],
    ) -> None:
        """``cost(key)``: (seconds at full rate, bytes) of a unit's weights. ``on_landed(key)`` is called when they are
        there."""
        super().__init__(events, record, "h2d", media, window)
        self.queues = LoadQueues()
        self.there: dict[UnitKey, float] = {}
        self.on_way: dict[UnitKey, None] = {}
        self._experts: dict[int, list[int]] = {}
        self._cost = cost
        self._on_landed = on_landed
        self._found: UnitKey | None = None

    def pull(self) -> Copy | None:
        if not self.queues.take(self._ask):
            return None
        key = self._found
        assert key is not None
        self.on_way[key] = None
        if key.is_expert:
            self._experts.setdefault(key.layer, []).append(key.expert)
        seconds, num_bytes = self._cost(key)
        if key.is_expert:
            kind, name = "load_expert", f"load L{key.layer} E{key.expert}"
        else:
            kind, name = "load_dense", f"load L{key.layer}"
        return Copy(seconds, lambda: self._arrived(key), kind, name, num_bytes)

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
