"""What loaders have in common: errors and statistics; and the loader for where nothing has to be loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from isthmus.planning.loading import Phase
from isthmus.spec.model import UnitKey
from isthmus.tuning.accelerator.base import Event
from isthmus.tuning.slots import Slot

_FORGETTING = 0.9
"""Weight of all earlier copies against the latest in the estimate of the link's rate."""

Source = Callable[[UnitKey], Tensor | None]
"""The flat host weights of an expert, (numel,); None: there are none to load at present."""


class NotLoadableError(KeyError):
    """An expert was to be acquired of which the source has no weights."""

    def __str__(self) -> str:
        return str(self.args[0])


class NoSlotError(RuntimeError):
    """Every slot is held by the computing thread itself, so that waiting for one would never end."""


@dataclass(frozen=True, kw_only=True)
class LoaderStats:
    """What a loader has done so far."""

    loaded_bytes: int = 0
    num_loads: int = 0
    num_demand_loads: int = 0
    """Loads that nobody had queued when they were needed."""
    num_stale_loads: int = 0
    """Loads that landed after their expert had been invalidated."""
    num_evictions: int = 0
    num_dropped: int = 0
    """Queue entries that were replaced or cleared before they came up."""
    idle_s: float = 0.0
    """Time in which nothing was in flight although a queue held something: no slot was to be had."""


@dataclass(frozen=True, slots=True)
class _Flight:
    num_bytes: int
    launched_s: float


class Flights:
    """The copies under way into slots, in the order of their launch, and how fast they land. Not thread-safe."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._flights: dict[Slot, _Flight] = {}
        self._last_landing_s = 0.0
        self._seconds, self._bytes = 0.0, 0.0

    def __len__(self) -> int:
        return len(self._flights)

    def launched(self, slot: Slot, num_bytes: int) -> None:
        self._flights[slot] = _Flight(num_bytes, self._now_s())

    def landed(self, slot: Slot) -> int:
        """Returns the bytes that have landed."""
        flight = self._flights.pop(slot)
        now_s = self._now_s()
        elapsed_s = now_s - max(flight.launched_s, self._last_landing_s)
        self._last_landing_s = now_s
        self._seconds = _FORGETTING * self._seconds + elapsed_s
        self._bytes = _FORGETTING * self._bytes + flight.num_bytes
        return flight.num_bytes

    def wait_s(self, slot: Slot | None) -> float:
        """Seconds until the slot's copy lands, at the rate of the latest ones; 0 where none is under way."""
        if slot is None or slot not in self._flights or not self._bytes:
            return 0.0
        in_order = list(self._flights)
        ahead = sum(self._flights[other].num_bytes for other in in_order[: in_order.index(slot) + 1])
        return ahead * self._seconds / self._bytes


class HostLoader:
    """Stands in for ``ExpertLoader`` where there is no separate memory: every expert is always where it is computed."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.stats = LoaderStats()

    def set_queue(self, phase: Phase, keys: Sequence[UnitKey]) -> None:
        """Nothing to load."""

    def clear(self, phase: Phase) -> None:
        """Nothing is queued."""

    def is_resident(self, key: UnitKey) -> bool:
        return True

    def is_in_flight(self, key: UnitKey) -> bool:
        return False

    def estimated_wait_s(self, key: UnitKey) -> float:
        return 0.0

    def acquire(self, key: UnitKey) -> Tensor:
        """The host weights themselves. Raises ``NotLoadableError`` if there are none."""
        weights = self._source(key)
        if weights is None:
            raise NotLoadableError(f"key: {key} has no weights at present, wanted one that the source knows.")
        return weights

    def release(self, *keys: UnitKey) -> None:
        """Nothing was pinned."""

    def invalidate(self, keys: Sequence[UnitKey] | None = None) -> None:
        """There are no copies that could be stale."""

    def take_slot(self) -> Tensor:
        raise RuntimeError("there are no slots without a separate memory: let the gradient accumulate in the store.")

    def give_slot(self, slot: Tensor, after: Event | None) -> None:
        raise RuntimeError("there are no slots without a separate memory: none can have been taken.")

    def close(self) -> None:
        """Nothing to give back."""
