"""Slots of accelerator memory, one expert each: which expert is where, which slot is free, which is given up next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from isthmus.spec.model import UnitKey
from isthmus.tuning.accelerator.base import Event

_NOT_A_VICTIM = -np.inf
_NUM_REFRESHED = 64


@dataclass(eq=False, slots=True)
class Slot:
    """Memory for one expert's weights or gradient."""

    number: int
    memory: Tensor
    """Shape (slot_numel,)."""
    key: UnitKey | None = None
    """The expert whose current weights are here or on their way; None also while stale weights are still arriving."""
    numel: int = 0
    loading: Event | None = None
    """The copy under way into the slot."""
    busy_until: Event | None = None
    """What still reads or drains the slot when it is overwritten next."""
    num_pins: int = 0
    is_lent: bool = False
    was_used: bool = False

    @property
    def is_held(self) -> bool:
        """Whether the computing thread has the slot and must give it back."""
        return self.is_lent or self.num_pins > 0

    @property
    def is_evictable(self) -> bool:
        return self.key is not None and self.loading is None and not self.is_held

    @property
    def is_drained(self) -> bool:
        return self.busy_until is None or self.busy_until.is_done()


class SlotTable:
    """Who is in which slot. Not thread-safe: the loader calls it under its lock.

    The victim is the evictable key with the furthest next use (Belady). Next uses change as the computation moves on,
    and asking for all of them at every load would cost more than a small copy: each search asks for ``_NUM_REFRESHED``
    of them in turn and for the winner's, and believes what it knows of the rest. Up to that many slots it is exact.
    """

    def __init__(self, buffer: Tensor, next_use: Callable[[UnitKey], float]) -> None:
        """``buffer``: (num_slots, slot_numel)."""
        self._slots = [Slot(number, memory) for number, memory in enumerate(buffer.unbind(0))]
        self._by_key: dict[UnitKey, Slot] = {}
        self._by_address = {slot.memory.data_ptr(): slot for slot in self._slots}
        self._free = dict.fromkeys(self._slots)
        """Insertion order: the slot that was freed first comes first."""
        self._next_use = next_use
        self._known_uses = np.full(len(self._slots), _NOT_A_VICTIM)
        self._hand = 0
        self.num_unheld = len(self._slots)
        """Slots that the computing thread does not hold."""
        self._urgent: set[int] = set()
        """Slots whose expert the present layer asked for and has not used yet."""

    def of(self, key: UnitKey) -> Slot | None:
        return self._by_key.get(key)

    def lent(self, memory: Tensor) -> Slot | None:
        """The slot that was lent as ``memory``."""
        slot = self._by_address.get(memory.data_ptr())
        return slot if slot is not None and slot.is_lent else None

    @property
    def keys(self) -> list[UnitKey]:
        """Keys that are resident or on their way."""
        return list(self._by_key)

    def landed_run(self, keys: Sequence[UnitKey], *, most_slots: int) -> list[Slot]:
        """The slots of the first of ``keys``, as many as are there, whole, in slots of ascending numbers of which the
        last is fewer than ``most_slots`` from the first."""
        run: list[Slot] = []
        for key in keys:
            slot = self._by_key.get(key)
            if slot is None or slot.loading is not None:
                break
            if run and not run[-1].number < slot.number < run[0].number + most_slots:
                break
            run.append(slot)
        return run

    def free_slot(self, *, is_drained: bool) -> Slot | None:
        """The slot that has been free the longest; ``is_drained``: only one that can be overwritten at once."""
        return next((slot for slot in self._free if slot.is_drained or not is_drained), None)

    def occupy(self, slot: Slot, key: UnitKey, numel: int, loading: Event, *, is_urgent: bool) -> None:
        """The weights of ``key`` are on their way into a free slot."""
        del self._free[slot]
        slot.key, slot.numel, slot.loading = key, numel, loading
        slot.was_used = False
        self._by_key[key] = slot
        if is_urgent:
            self._urgent.add(slot.number)

    def pin(self, slot: Slot) -> None:
        """The computing thread has acquired the expert in the slot once more."""
        self.num_unheld -= not slot.is_held
        slot.num_pins += 1
        self.changed(slot)

    def unpin(self, slot: Slot) -> None:
        slot.num_pins -= 1
        self.num_unheld += not slot.is_held

    def used(self, slot: Slot, busy_until: Event) -> None:
        """The computing thread is done with the expert, for now."""
        slot.was_used, slot.busy_until = True, busy_until
        self._urgent.discard(slot.number)
        self.changed(slot)

    def nothing_is_urgent(self) -> None:
        self._urgent.clear()

    def lend(self, slot: Slot) -> None:
        del self._free[slot]
        slot.is_lent = True
        self.num_unheld -= 1

    def forget(self, slot: Slot) -> None:
        """What is in the slot is of no use any more. It becomes free once nothing is on its way into it."""
        if slot.key is not None:
            del self._by_key[slot.key]
        self.num_unheld += slot.is_lent
        slot.key, slot.is_lent = None, False
        self._urgent.discard(slot.number)
        if slot.loading is None:
            self._free[slot] = None
        self.changed(slot)

    def changed(self, slot: Slot) -> None:
        """To be called whenever a slot may have become evictable, or no longer is."""
        use = self._next_use(slot.key) if slot.is_evictable and slot.key is not None else _NOT_A_VICTIM
        self._known_uses[slot.number] = use

    def victim(self, *, may_be_urgent: bool) -> tuple[Slot, float] | None:
        """The evictable slot with the furthest next use, and that use; of equals, one that has been used already."""
        self._refresh()
        uses = self._known_uses
        if self._urgent and not may_be_urgent:
            uses = uses.copy()
            uses[list(self._urgent)] = _NOT_A_VICTIM
        while (furthest := uses.max()) > _NOT_A_VICTIM:
            equals = [self._slots[number] for number in np.flatnonzero(uses == furthest)]
            slot = next((slot for slot in equals if slot.was_used), equals[0])
            assert slot.key is not None
            use = self._next_use(slot.key)
            if use == furthest:
                return slot, use
            uses[slot.number] = self._known_uses[slot.number] = use
        return None

    def _refresh(self) -> None:
        for _ in range(min(_NUM_REFRESHED, len(self._slots))):
            self.changed(self._slots[self._hand])
            self._hand = (self._hand + 1) % len(self._slots)
