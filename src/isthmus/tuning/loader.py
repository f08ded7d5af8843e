"""Brings experts' weights to the accelerator, the most urgent first (APTMoE, demand-priority scheduling).

Three queues, one per loading phase. Copies cannot be interrupted, so only a bounded window of them is launched at a
time; whenever one lands, the next comes from the most urgent queue that holds something. So the copy engine has work
while the host is busy (the paper refills only before a window's last copy: the engine idles if the host is late by one
copy), and an urgent expert never waits behind more than the window. Where everything is taken, the expert whose next
use is furthest gives way (Belady), unless it is wanted sooner than what would replace it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from isthmus.planning.loading import LoadQueues, Phase, Verdict
from isthmus.spec.model import UnitKey
from isthmus.tuning.accelerator.base import Accelerator, Event
from isthmus.tuning.loading import Flights, HostLoader, LoaderStats, NoSlotError, NotLoadableError, Source
from isthmus.tuning.slots import Slot, SlotTable

__all__ = ["ExpertLoader", "HostLoader", "LoaderStats", "NoSlotError", "NotLoadableError", "Phase"]


class ExpertLoader:
    """Slots of accelerator memory, filled by phase and urgency.

    Queues may be changed from any thread. ``acquire``, ``release``, ``take_slot`` and ``give_slot`` belong to the
    computing thread: what it holds only it can give back, so it gets ``NoSlotError`` instead of waiting for itself.
    ``next_use`` and ``source`` are called under the loader's lock, from any thread: they must be quick, and neither
    call the loader nor take a lock under which it is called.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        num_slots: int,
        slot_numel: int,
        dtype: torch.dtype,
        source: Source,
        window: int,
        next_use: Callable[[UnitKey], float],
        changed: threading.Condition | None = None,
    ) -> None:
        """Allocates (num_slots, slot_numel) on the accelerator (``AcceleratorMemoryError``).

        ``source(key)``: the expert's flat host weights, (numel <= slot_numel,), or None if there are none to load at
        present. ``window``: most copies in flight. ``next_use(key)``: when the expert is wanted next; later is larger,
        ``inf`` is never. ``changed``: what waits and locks, for a rehearsal on a clock.
        """
        for field, value in (("num_slots", num_slots), ("slot_numel", slot_numel), ("window", window)):
            if value < 1:
                raise ValueError(f"{field}: got {value}, wanted 1 or more.")
        self.num_slots = num_slots
        self.num_reserved = 0  # slots that inter-stage loads leave free, for gradients; may be set at any time
        self.window = window
        self._accelerator = accelerator
        self._source = source
        self._next_use = next_use
        self.buffer = accelerator.allocate((num_slots, slot_numel), dtype)
        """(num_slots, slot_numel): to be read where the caller has acquired what is in a slot, and nowhere else."""
        self._table = SlotTable(self.buffer, next_use)
        self._changed = changed or threading.Condition()
        self._queues = LoadQueues()
        self._flights = Flights(accelerator.recorder.now_s)
        self._demanded: UnitKey | None = None
        """What the computing thread blocks on in ``acquire``."""
        self._is_slot_awaited = False
        self._is_closed = False
        self._error: BaseException | None = None  # raised when something is next acquired or taken
        self._stats = LoaderStats()
        self._idle_since_s: float | None = None

    # --- queues ----------------------------------------------------------------------------------------------------

    def set_queue(self, phase: Phase, keys: Sequence[UnitKey]) -> None:
        """Replaces what is still waiting in the phase's queue, most urgent first. Never blocks for a copy.

        Keys that are resident or in flight when they come up are skipped.
        """
        with self._changed:
            self._check_open()
            self._count(num_dropped=self._queues.replace(phase, keys))
            self._refill()

    def clear(self, phase: Phase) -> None:
        """Drops what is still waiting in the phase's queue."""
        with self._changed:
            if phase is Phase.EXPERT:
                self._table.nothing_is_urgent()
            self._count(num_dropped=self._queues.clear(phase))
            self._refill()

    def queued(self, phase: Phase) -> list[UnitKey]:
        return self._queues.waiting(phase)

    # --- what is where ---------------------------------------------------------------------------------------------

    def is_resident(self, key: UnitKey) -> bool:
        """Whether the expert's current weights are on the accelerator, whole."""
        return self.landed_slots([key]) != [None]

    def landed_slots(self, keys: Sequence[UnitKey]) -> list[int | None]:
        """The number of the slot in which each expert's current weights are; None: they are not there, or not whole."""
        with self._changed:
            slots = [self._table.of(key) for key in keys]
            return [slot.number if slot is not None and slot.loading is None else None for slot in slots]

    def is_in_flight(self, key: UnitKey) -> bool:
        with self._changed:
            slot = self._table.of(key)
            return slot is not None and slot.loading is not None

    def resident_keys(self) -> list[UnitKey]:
        with self._changed:
            return [key for key in self._table.keys if self._slot(key).loading is None]

    def in_flight_keys(self) -> list[UnitKey]:
        with self._changed:
            return [key for key in self._table.keys if self._slot(key).loading is not None]

    def estimated_wait_s(self, key: UnitKey) -> float:
        """Seconds until an expert in flight lands, at the rate of the latest loads; 0 if it is not in flight."""
        with self._changed:
            return self._flights.wait_s(self._table.of(key))

    @property
    def num_unheld(self) -> int:
        """Slots that the computing thread could still get, by and by, with what it holds at present."""
        with self._changed:
            return self._table.num_unheld

    @property
    def stats(self) -> LoaderStats:
        with self._changed:
            return self._stats

    # --- the computing thread --------------------------------------------------------------------------------------

    def acquire(self, key: UnitKey) -> Tensor:
        """The expert's weights (numel,) on the accelerator, there until ``release``; compute waits for their copy.

        What is not even in flight is loaded at once, ahead of everything queued, and may evict all that is not held.
        Blocks the host until the copy is launched (where compute is synchronous: until it has ended). Raises
        ``NotLoadableError`` if there are no weights, ``NoSlotError`` if the caller holds every slot itself.
        """
        with self._changed:
            self._check_open()
            self._demanded = key
            try:
                while (slot := self._table.of(key)) is None:
                    self._demand(key)
                    if (slot := self._table.of(key)) is not None:
                        break
                    self._check_slots(f"to load {key}")
                    self._wait(f"load L{key.layer} E{key.expert}")
            finally:
                self._demanded = None
            self._table.pin(slot)
            loading = slot.loading
        if loading is not None:
            try:
                self._accelerator.wait_for(loading)
            except BaseException as error:
                with self._changed:
                    self._table.unpin(slot)
                    self._fail(slot, error)
                raise
        return slot.memory[: slot.numel]

    def acquire_run(self, keys: Sequence[UnitKey], *, most_slots: int) -> list[int]:
        """Acquires the first of ``keys``, as many as are there, whole, in slots of ascending numbers, the last fewer
        than ``most_slots`` from the first. Returns these numbers; none where the first is not there. Never blocks."""
        with self._changed:
            self._check_open()
            run = self._table.landed_run(keys, most_slots=most_slots)
            for slot in run:
                self._table.pin(slot)
            return [slot.number for slot in run]

    def release(self, *keys: UnitKey) -> None:
        """Undoes one ``acquire`` of each. The slots are not overwritten before the compute issued so far has ended."""
        with self._changed:
            event = self._accelerator.record()
            for key in keys:
                slot = self._table.of(key)
                if slot is None or not slot.num_pins:
                    raise ValueError(f"key: got {key}, which is not acquired; wanted one release per acquire.")
                self._table.unpin(slot)
                if not slot.num_pins:
                    self._table.used(slot, busy_until=event)
            self._refill()

    def take_slot(self) -> Tensor:
        """An uninitialised slot (slot_numel,) for the caller, who may compute on it at once; may evict an expert.

        Blocks while every slot is held or being loaded into. Raises ``NoSlotError`` if the caller holds them all.
        """
        with self._changed:
            self._check_open()
            self._is_slot_awaited = True
            try:
                while (slot := self._find_slot(Phase.EXPERT, None)) is None:
                    self._check_slots("for a gradient")
                    self._wait("gradient slot")
                    self._check_open()
            finally:
                self._is_slot_awaited = False
            self._table.lend(slot)
            self._refill()
        if slot.busy_until is not None:
            self._accelerator.wait_for(slot.busy_until)
        return slot.memory

    def give_slot(self, slot: Tensor, after: Event | None) -> None:
        """Gives back what ``take_slot`` lent, to be overwritten after ``after`` (None: the compute issued so far)."""
        with self._changed:
            lent = self._table.lent(slot)
            if lent is None:
                raise ValueError(f"slot: got a tensor of shape {tuple(slot.shape)}, wanted one from take_slot(), once.")
            lent.busy_until = after or self._accelerator.record()
            self._table.forget(lent)
            self._refill()

    def invalidate(self, keys: Sequence[UnitKey] | None = None) -> None:
        """The host weights of ``keys`` (None: all) have changed: their copies are never used again.

        Also right before they change, if they are queued and acquired again only afterwards. Copies in flight are stale
        when they land. Raises ``ValueError``, changing nothing, if one of the keys is acquired.
        """
        with self._changed:
            slots = [slot for key in (self._table.keys if keys is None else keys) if (slot := self._table.of(key))]
            pinned = [slot.key for slot in slots if slot.num_pins]
            if pinned:
                raise ValueError(
                    f"keys: got {pinned[0]}, which is acquired; wanted it released before its weights change."
                )
            for slot in slots:
                self._table.forget(slot)
            self._refill()

    def close(self) -> None:
        """Drops the queues, waits for what is in flight and gives the memory back. Idempotent."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._queues.clear()
            while self._flights:
                self._changed.wait()
        self._accelerator.free(self.buffer)

    # --- under the lock --------------------------------------------------------------------------------------------

    def _slot(self, key: UnitKey) -> Slot:
        slot = self._table.of(key)
        assert slot is not None
        return slot

    def _count(self, **more: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + value for name, value in more.items()})

    def _wait(self, purpose: str) -> None:
        with self._accelerator.recorder.span("accelerator", purpose, kind="wait"):
            self._changed.wait()

    def _check_open(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"loading experts failed: {self._error}") from self._error
        if self._is_closed:
            raise RuntimeError("the loader is closed")

    def _check_slots(self, purpose: str) -> None:
        if not self._table.num_unheld:
            raise NoSlotError(
                f"num_slots: got {self.num_slots}, all of them acquired or taken by the caller, wanted one more "
                f"{purpose}: release or give back some first, or raise --accelerator-memory."
            )

    def _demand(self, key: UnitKey) -> None:
        """Puts ``key`` ahead of everything and launches what can be."""
        self._check_open()
        if self._source(key) is None:
            raise NotLoadableError(f"key: {key} has no weights to load at present, wanted one that the source knows.")
        if not self._queues.demand(key):
            self._count(num_demand_loads=1)
        self._refill()

    def _refill(self) -> None:
        """Launches copies up to the window and wakes who waits."""
        is_open = self._error is None and not self._is_closed and not self._is_slot_awaited
        while is_open and len(self._flights) < self.window and self._queues.take(self._try_launch):
            pass
        now_s = self._accelerator.recorder.now_s()
        if self._flights or not self._queues:
            if self._idle_since_s is not None:
                self._count(idle_s=now_s - self._idle_since_s)
            self._idle_since_s = None
        elif self._idle_since_s is None:
            self._idle_since_s = now_s
        self._changed.notify_all()

    def _try_launch(self, phase: Phase, key: UnitKey) -> Verdict:
        """Launches the load of a queue's first if there is something to load and a slot to be had."""
        if self._table.of(key) is not None:
            return Verdict.SKIP
        weights = self._source(key)
        if weights is None:
            self._count(num_dropped=1)
            return Verdict.SKIP
        slot = self._find_slot(phase, key)
        if slot is None:
            return Verdict.WAIT
        self._launch(phase, key, slot, weights)
        return Verdict.TAKE

    def _find_slot(self, phase: Phase, key: UnitKey | None) -> Slot | None:
        """A slot for ``key`` (None: for the caller), made free if need be; None: all are held or wanted sooner."""
        is_full = phase is Phase.STAGE and len(self._table.keys) + self.num_reserved >= self.num_slots
        slot = None if is_full else self._table.free_slot(is_drained=True)
        if slot is not None:
            return slot
        is_blocking = key is None or key == self._demanded
        found = self._table.victim(may_be_urgent=False)
        if found is None and is_blocking:
            found = self._table.victim(may_be_urgent=True)
        if found is not None:
            slot, use = found
            if key is None or phase is Phase.EXPERT or use > self._next_use(key):
                self._table.forget(slot)
                self._count(num_evictions=1)
                return slot
        return None if is_full else self._table.free_slot(is_drained=False)

    def _launch(self, phase: Phase, key: UnitKey, slot: Slot, weights: Tensor) -> None:
        numel = weights.numel()
        if numel > slot.memory.numel():
            raise ValueError(
                f"source: got {numel} values for {key}, wanted at most slot_numel = {slot.memory.numel()}."
            )
        event = self._accelerator.copy(
            slot.memory[:numel],
            weights,
            "h2d",
            name=f"load L{key.layer} E{key.expert}",
            kind="load_expert",
            after=slot.busy_until,
            on_done=lambda: self._landed(slot),
        )
        # on_done may be on its way already: it waits for the lock that we hold.
        self._table.occupy(slot, key, numel, event, is_urgent=phase is Phase.EXPERT)
        self._flights.launched(slot, numel * weights.element_size())

    def _landed(self, slot: Slot) -> None:
        """A copy has ended. Called from a copy engine's thread."""
        with self._changed:
            num_bytes = self._flights.landed(slot)
            loading, slot.loading = slot.loading, None
            try:
                assert loading is not None
                loading.wait()
                is_stale = slot.key is None
                self._count(loaded_bytes=num_bytes, num_loads=1, num_stale_loads=is_stale)
                if is_stale:
                    self._table.forget(slot)
                else:
                    self._table.changed(slot)
                self._refill()
            except Exception as error:
                self._fail(slot, error)

    def _fail(self, slot: Slot, error: BaseException) -> None:
        """From here on the computing thread gets ``error`` whenever it acquires or takes something."""
        self._error = self._error or error
        if slot.key is not None and slot.loading is None and not slot.num_pins:
            self._table.forget(slot)
        self._changed.notify_all()
