"""The loader's invariants: what may be loaded when, what may be evicted, and that no schedule changes a value."""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isthmus.reporting.recorder import Recorder
from isthmus.spec.model import UnitKey
from isthmus.tuning.accelerator.base import Event
from isthmus.tuning.accelerator.emulated import EmulatedAccelerator
from isthmus.tuning.loader import ExpertLoader, HostLoader, NoSlotError, NotLoadableError, Phase

NUMEL = 32
KEYS = [UnitKey(layer, expert) for layer in range(3) for expert in range(3)]


class Watched(EmulatedAccelerator):
    """Notes the order in which loads are launched and the most that were in flight."""

    def __init__(self, num_slots: int, copy_delay: Callable[[], float] | None) -> None:
        super().__init__(
            budget_bytes=num_slots * NUMEL * 4,
            recorder=Recorder(),
            h2d_bytes_per_s=1e12,
            d2h_bytes_per_s=1e12,
            copy_delay=copy_delay,
        )
        self.launched: list[str] = []
        self.num_in_flight = 0
        self.most_in_flight = 0
        self.num_landed = 0
        self.progress = threading.Condition()

    def copy(self, destination: Tensor, source: Tensor, direction, *, on_done=None, **named) -> Event:  # type: ignore[override]
        if direction == "d2h" or on_done is None:
            return super().copy(destination, source, direction, on_done=on_done, **named)
        with self.progress:
            self.launched.append(named["name"].removeprefix("load "))
            self.num_in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.num_in_flight)

        def landed() -> None:
            with self.progress:
                self.num_in_flight -= 1
            on_done()
            with self.progress:
                self.num_landed += 1
                self.progress.notify_all()

        return super().copy(destination, source, direction, on_done=landed, **named)


@dataclass
class Bench:
    """A loader over host weights that say which expert and version they are."""

    accelerator: Watched
    loader: ExpertLoader
    weights: dict[UnitKey, Tensor]
    uses: dict[UnitKey, float]
    steps: threading.Semaphore
    num_stepped: int = 0
    versions: dict[UnitKey, int] = field(default_factory=dict)

    def land(self, num_copies: int = 1) -> None:
        """Lets so many copies end (``step_by_step`` only)."""
        self.num_stepped += num_copies
        self.steps.release(num_copies)
        with self.accelerator.progress:
            assert self.accelerator.progress.wait_for(lambda: self.accelerator.num_landed == self.num_stepped, 10)

    def settle(self) -> None:
        """Waits until nothing is in flight and nothing can be launched."""
        watched = self.accelerator
        with watched.progress:
            assert watched.progress.wait_for(lambda: watched.num_landed == len(watched.launched), 10)

    def change(self, key: UnitKey) -> None:
        self.versions[key] = self.versions.get(key, 0) + 1
        self.weights[key].copy_(values(key, self.versions[key]))
        self.loader.invalidate([key])

    def current(self, key: UnitKey) -> Tensor:
        return values(key, self.versions.get(key, 0))


def values(key: UnitKey, version: int) -> Tensor:
    return torch.arange(NUMEL) + 1000.0 * (1 + key.layer * 10 + key.expert) + 0.001 * version


def name(key: UnitKey) -> str:
    return f"L{key.layer} E{key.expert}"


@contextlib.contextmanager
def bench(
    *,
    num_slots: int = 4,
    window: int = 2,
    copy_delay: Callable[[], float] | None = None,
    step_by_step: bool = False,
    keys: list[UnitKey] = KEYS,
) -> Iterator[Bench]:
    steps = threading.Semaphore(0)

    def next_step() -> float:
        assert steps.acquire(timeout=10)
        return 0.0

    weights = {key: values(key, 0) for key in keys}
    uses = {key: float(key.layer) for key in keys}
    with Watched(num_slots, next_step if step_by_step else copy_delay) as accelerator:
        loader = ExpertLoader(
            accelerator,
            num_slots=num_slots,
            slot_numel=NUMEL,
            dtype=torch.float32,
            source=weights.get,
            window=window,
            next_use=lambda key: uses.get(key, math.inf),
        )
        try:
            yield Bench(accelerator, loader, weights, uses, steps)
        finally:
            steps.release(1000)
            loader.close()
            assert accelerator.allocated_bytes == 0
    assert not [t.name for t in threading.enumerate() if t.name in ("isthmus-h2d", "isthmus-d2h")]


@contextlib.contextmanager
def land_once(b: Bench, is_waiting: Callable[[], bool]) -> Iterator[None]:
    """Lets all copies end as soon as the body is seen to wait (``step_by_step`` only)."""
    is_over = threading.Event()

    def release() -> None:
        while not is_waiting() and not is_over.is_set():
            time.sleep(1e-4)
        b.steps.release(100)

    thread = threading.Thread(target=release)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


# --- any program ------------------------------------------------------------------------------------------------------

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["queue", "clear", "acquire", "run", "release", "take", "give", "change", "use"]),
        st.integers(0, 10_000),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, num_slots=st.integers(1, 4), window=st.integers(1, 4), seed=st.integers(0, 100))
def test_no_program_gets_wrong_weights_or_breaks_a_bound(
    actions: list[tuple[str, int]], num_slots: int, window: int, seed: int
) -> None:
    """Budget, window, slots and pins hold; what is acquired is the host's current version, until it is released."""
    delays = random.Random(seed)
    with bench(num_slots=num_slots, window=window, copy_delay=lambda: delays.choice([0, 0, 1e-4, 5e-4])) as b:
        held = Held(b, num_slots)
        for action, number in actions:
            held.perform(action, random.Random(number))
            held.check()
            assert b.accelerator.most_in_flight <= window
            assert b.accelerator.allocated_bytes == b.accelerator.peak_bytes == num_slots * NUMEL * 4
        for phase in Phase:
            b.loader.clear(phase)
            assert b.loader.queued(phase) == []
        held.check()
        b.settle()
        held.check()
        assert set(b.accelerator.launched) <= {name(key) for key in held.asked}
        stats = b.loader.stats
        assert stats.num_loads == b.accelerator.num_landed == len(b.accelerator.launched)
        assert stats.loaded_bytes == b.accelerator.copied_bytes()["h2d"]


class Held:
    """What the program has acquired and taken, and what must be in there."""

    def __init__(self, b: Bench, num_slots: int) -> None:
        self.b = b
        self.num_slots = num_slots
        self.pins: list[tuple[UnitKey, Tensor]] = []
        self.lent: list[tuple[float, Tensor]] = []
        self.asked: set[UnitKey] = set()

    def perform(self, action: str, choice: random.Random) -> None:
        b, key = self.b, choice.choice(KEYS)
        if action == "queue":
            keys = choice.sample(KEYS, choice.randrange(6))
            self.asked.update(keys)
            b.loader.set_queue(choice.choice(list(Phase)), keys)
        elif action == "clear":
            b.loader.clear(choice.choice(list(Phase)))
        elif action == "use":
            b.uses[key] = choice.choice([0.0, 1.0, 2.0, math.inf])
        elif action == "change" and key not in {pinned for pinned, _ in self.pins}:
            b.change(key)
        elif action == "acquire":
            self.asked.add(key)
            self._acquire(key)
        elif action == "run":
            self._acquire_run(choice.sample(KEYS, choice.randrange(6)), choice.randrange(1, 5))
        elif action == "release" and self.pins:
            b.loader.release(self.pins.pop(choice.randrange(len(self.pins)))[0])
        elif action == "take":
            self._take(choice.random())
        elif action == "give" and self.lent:
            mark, slot = self.lent.pop(choice.randrange(len(self.lent)))
            result = torch.zeros(NUMEL)
            event = b.accelerator.copy(result, slot, "d2h", after=b.accelerator.record())
            b.loader.give_slot(slot, event)
            b.loader.set_queue(Phase.EXPERT, [key])  # wants the slot at once, while the gradient is still leaving
            self.asked.add(key)
            event.wait()
            assert (result == mark).all()

    def num_held(self) -> int:
        return len({key for key, _ in self.pins}) + len(self.lent)

    def _acquire(self, key: UnitKey) -> None:
        if self.num_held() == self.num_slots and key not in {pinned for pinned, _ in self.pins}:
            with pytest.raises(NoSlotError, match="all of them acquired or taken"):
                self.b.loader.acquire(key)
            return
        self.pins.append((key, self.b.loader.acquire(key)))

    def _acquire_run(self, keys: list[UnitKey], most_slots: int) -> None:
        loader = self.b.loader
        numbers = loader.acquire_run(keys, most_slots=most_slots)
        assert numbers == sorted(set(numbers)) and (not numbers or numbers[-1] - numbers[0] < most_slots)
        assert numbers == loader.landed_slots(keys)[: len(numbers)]
        self.pins += [(key, loader.buffer[number]) for key, number in zip(keys, numbers, strict=False)]

    def _take(self, mark: float) -> None:
        if self.num_held() == self.num_slots:
            with pytest.raises(NoSlotError, match="wanted one more for a gradient"):
                self.b.loader.take_slot()
            return
        slot = self.b.loader.take_slot()
        slot.fill_(mark)
        self.lent.append((float(slot[0]), slot))

    def check(self) -> None:
        pinned = dict(self.pins)
        addresses = [tensor.data_ptr() for tensor in (*pinned.values(), *(slot for _, slot in self.lent))]
        assert len(set(addresses)) == len(addresses)
        for key, tensor in self.pins:
            self.b.accelerator.require_resident(tensor)
            assert torch.equal(tensor, self.b.current(key))
        for mark, slot in self.lent:
            assert (slot == mark).all()
        loader = self.b.loader
        assert loader.num_unheld == self.num_slots - self.num_held()
        assert len(loader.resident_keys()) + len(self.lent) <= self.num_slots


@settings(max_examples=20, deadline=None)
@given(
    queues=st.lists(st.permutations(range(len(KEYS))), min_size=3, max_size=3),
    window=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_everything_that_fits_is_loaded_and_the_queues_end_empty(
    queues: list[list[int]], window: int, seed: int
) -> None:
    delays = random.Random(seed)
    with bench(num_slots=len(KEYS), window=window, copy_delay=lambda: delays.random() * 1e-4) as b:
        for phase, order in zip(Phase, queues, strict=True):
            b.loader.set_queue(phase, [KEYS[number] for number in order[: 3 + phase]])
        b.settle()
        wanted = {KEYS[number] for phase, order in zip(Phase, queues, strict=True) for number in order[: 3 + phase]}
        assert set(b.loader.resident_keys()) == wanted
        assert sorted(b.accelerator.launched) == sorted(name(key) for key in wanted), "nothing is loaded twice"
        assert not any(b.loader.queued(phase) for phase in Phase)
        assert b.loader.in_flight_keys() == []


# --- urgency ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_an_urgent_expert_waits_behind_at_most_a_window_of_copies(window: int) -> None:
    with bench(num_slots=9, window=window, step_by_step=True) as b:
        b.loader.set_queue(Phase.STAGE, KEYS[1:])
        assert b.accelerator.launched == [name(key) for key in KEYS[1 : 1 + window]]
        b.loader.set_queue(Phase.EXPERT, [KEYS[0]])
        b.land(9)
        assert b.accelerator.launched.index(name(KEYS[0])) == window
        assert b.accelerator.most_in_flight == window


def test_the_window_is_kept_full_while_a_queue_holds_something() -> None:
    with bench(num_slots=9, window=3, step_by_step=True) as b:
        b.loader.set_queue(Phase.STAGE, KEYS)
        for num_launched in (3, 4, 5, 6, 7, 8, 9, 9, 9):
            assert len(b.accelerator.launched) == num_launched
            b.land()


def test_phases_come_in_the_order_of_their_urgency() -> None:
    with bench(num_slots=9, window=1, step_by_step=True) as b:
        b.loader.set_queue(Phase.STAGE, KEYS[:3])
        b.loader.set_queue(Phase.LAYER, KEYS[3:5])
        b.loader.set_queue(Phase.EXPERT, KEYS[5:7])
        b.land(7)
        assert b.accelerator.launched == [name(KEYS[i]) for i in (0, 5, 6, 3, 4, 1, 2)]


def test_replaced_and_cleared_entries_never_load() -> None:
    with bench(num_slots=9, window=1, step_by_step=True) as b:
        b.loader.set_queue(Phase.STAGE, KEYS[:5])
        b.loader.set_queue(Phase.STAGE, KEYS[4:6])
        b.loader.set_queue(Phase.LAYER, KEYS[6:8])
        b.loader.clear(Phase.LAYER)
        b.land(3)
        assert b.accelerator.launched == [name(KEYS[i]) for i in (0, 4, 5)]
        assert b.loader.stats.num_dropped == 3 + 2


def test_what_is_acquired_overtakes_everything_queued() -> None:
    with bench(num_slots=9, window=2, step_by_step=True) as b:
        b.loader.set_queue(Phase.EXPERT, KEYS[:4])
        b.loader.set_queue(Phase.STAGE, KEYS[4:])
        with land_once(b, lambda: b.loader._demanded is not None):
            assert torch.equal(b.loader.acquire(KEYS[7]), b.current(KEYS[7]))
        assert b.accelerator.launched.index(name(KEYS[7])) == 2
        assert b.loader.stats.num_demand_loads == 0
        b.loader.release(KEYS[7])
        b.settle()


def test_what_nobody_queued_is_loaded_on_demand() -> None:
    with bench(num_slots=1) as b:
        for key in KEYS[:3]:
            assert torch.equal(b.loader.acquire(key), b.current(key))
            b.loader.release(key)
        assert (b.loader.stats.num_demand_loads, b.loader.stats.num_evictions) == (3, 2)


def test_an_expert_without_weights_is_dropped_or_refused() -> None:
    with bench() as b:
        missing = UnitKey(9, 9)
        b.loader.set_queue(Phase.LAYER, [missing, KEYS[0]])
        b.settle()
        assert b.loader.resident_keys() == [KEYS[0]] and b.loader.queued(Phase.LAYER) == []
        with pytest.raises(NotLoadableError, match="no weights to load"):
            b.loader.acquire(missing)


# --- eviction ---------------------------------------------------------------------------------------------------------


def fill(b: Bench, keys: list[UnitKey]) -> None:
    b.loader.set_queue(Phase.STAGE, keys)
    b.settle()
    assert b.loader.resident_keys() == keys


def test_the_victim_is_what_is_wanted_last() -> None:
    with bench(num_slots=3) as b:
        fill(b, KEYS[:3])
        b.uses.update({KEYS[0]: 5.0, KEYS[1]: 9.0, KEYS[2]: 7.0, KEYS[3]: 6.0})
        b.loader.set_queue(Phase.STAGE, [KEYS[3]])
        b.settle()
        assert b.loader.resident_keys() == [KEYS[0], KEYS[2], KEYS[3]]


@pytest.mark.parametrize("phase", [Phase.LAYER, Phase.STAGE])
def test_a_prefetch_waits_rather_than_evict_what_is_wanted_sooner(phase: Phase) -> None:
    with bench(num_slots=2) as b:
        fill(b, KEYS[:2])
        b.uses[KEYS[8]] = b.uses[KEYS[0]]
        b.loader.set_queue(phase, [KEYS[8]])
        b.settle()
        assert b.loader.resident_keys() == KEYS[:2] and b.loader.queued(phase) == [KEYS[8]]
        b.loader.acquire(KEYS[0])
        b.uses[KEYS[0]] = math.inf
        b.loader.release(KEYS[0])
        b.settle()
        assert b.loader.resident_keys() == [KEYS[1], KEYS[8]]
        assert b.loader.stats.idle_s > 0


def test_an_urgent_load_evicts_even_what_is_wanted_sooner_but_nothing_pinned() -> None:
    with bench(num_slots=2) as b:
        fill(b, KEYS[:2])
        b.uses[KEYS[8]] = math.inf
        b.loader.acquire(KEYS[0])
        b.loader.set_queue(Phase.EXPERT, KEYS[7:])
        b.settle()
        assert b.loader.resident_keys() == [KEYS[0], KEYS[7]], "one urgent load does not push out another one unused"
        b.loader.acquire(KEYS[7])
        b.loader.release(KEYS[7])
        b.settle()
        assert b.loader.resident_keys() == [KEYS[0], KEYS[8]]


def test_what_was_urgent_may_go_once_the_decision_is_withdrawn() -> None:
    with bench(num_slots=1) as b:
        b.loader.set_queue(Phase.EXPERT, [KEYS[0]])
        b.settle()
        b.loader.clear(Phase.EXPERT)
        b.loader.set_queue(Phase.EXPERT, [KEYS[1]])
        b.settle()
        assert b.loader.resident_keys() == [KEYS[1]]


def test_of_equals_the_one_already_used_goes_first() -> None:
    with bench(num_slots=3) as b:
        fill(b, KEYS[:3])
        b.loader.acquire(KEYS[1])
        b.loader.release(KEYS[1])
        b.loader.set_queue(Phase.EXPERT, [KEYS[3]])
        b.settle()
        assert b.loader.resident_keys() == [KEYS[0], KEYS[2], KEYS[3]]


def test_with_many_slots_outdated_next_uses_are_noticed() -> None:
    keys = [UnitKey(0, expert) for expert in range(150)]
    with bench(num_slots=149, window=8, keys=keys) as b:
        b.uses.update({key: 1000.0 + key.expert for key in keys})
        fill(b, keys[:-1])
        b.uses.update({key: 5.0 for key in keys})
        b.uses[keys[30]] = 6.0
        b.loader.set_queue(Phase.EXPERT, [keys[-1]])
        b.settle()
        assert set(keys) - set(b.loader.resident_keys()) == {keys[30]}


# --- slots for gradients ----------------------------------------------------------------------------------------------


class Gate:
    def __init__(self) -> None:
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def is_done(self) -> bool:
        return self._open.is_set()

    def wait(self) -> None:
        assert self._open.wait(10)


def test_a_slot_is_not_overwritten_before_its_gradient_has_left() -> None:
    with bench(num_slots=1) as b:
        slot = b.loader.take_slot()
        slot.fill_(-1.0)
        left = Gate()
        b.loader.give_slot(slot, left)
        b.loader.set_queue(Phase.EXPERT, [KEYS[0]])
        assert b.loader.in_flight_keys() == [KEYS[0]] and (slot == -1.0).all()
        left.open()
        b.settle()
        assert b.loader.resident_keys() == [KEYS[0]]


def test_a_slot_that_has_drained_is_preferred_to_an_eviction_and_that_to_waiting() -> None:
    with bench(num_slots=3) as b:
        fill(b, [KEYS[0]])
        slots = [b.loader.take_slot(), b.loader.take_slot()]
        left = Gate()
        b.loader.give_slot(slots[0], left)
        b.loader.give_slot(slots[1], None)
        assert b.loader.take_slot().data_ptr() == slots[1].data_ptr()
        assert b.loader.resident_keys() == [KEYS[0]]
        b.loader.take_slot()
        assert b.loader.resident_keys() == []
        threading.Timer(0.01, left.open).start()
        assert b.loader.take_slot().data_ptr() == slots[0].data_ptr()
        assert left.is_done()


def test_a_slot_is_taken_ahead_of_loads_that_are_still_queued() -> None:
    with bench(num_slots=1, window=1, step_by_step=True) as b:
        b.uses.update({key: -float(number) for number, key in enumerate(KEYS)})
        b.loader.set_queue(Phase.STAGE, KEYS)
        with land_once(b, lambda: b.loader._is_slot_awaited):
            b.loader.take_slot()
        assert len(b.accelerator.launched) == 1


def test_a_run_ends_where_slots_do_not_ascend_or_an_expert_is_not_there() -> None:
    with bench(num_slots=4) as b:
        for key in KEYS[:4]:
            b.loader.acquire(key)
        b.loader.release(*KEYS[:4])
        assert b.loader.landed_slots(KEYS[:5]) == [0, 1, 2, 3, None]
        for wanted, keys, most_slots in (
            ([0, 1, 3], [KEYS[0], KEYS[1], KEYS[3], KEYS[4]], 4),
            ([1, 2], [KEYS[1], KEYS[2], KEYS[0]], 4),
            ([0, 1, 2], KEYS[:4], 3),
            ([], [KEYS[4], KEYS[0]], 4),
            ([], [], 4),
        ):
            assert b.loader.acquire_run(keys, most_slots=most_slots) == wanted
            assert b.loader.num_unheld == 4 - len(wanted)
            b.loader.release(*keys[: len(wanted)])
        assert b.accelerator.launched == [name(key) for key in KEYS[:4]]


def test_misuse_of_slots_and_pins_is_refused() -> None:
    with bench() as b:
        b.loader.acquire(KEYS[0])
        b.loader.release(KEYS[0])
        with pytest.raises(ValueError, match="one release per acquire"):
            b.loader.release(KEYS[0])
        slot = b.loader.take_slot()
        b.loader.give_slot(slot, None)
        with pytest.raises(ValueError, match=r"wanted one from take_slot\(\), once"):
            b.loader.give_slot(slot, None)
        for field_name in ("num_slots", "slot_numel", "window"):
            numbers = {"num_slots": 1, "slot_numel": 1, "window": 1, field_name: 0}
            with pytest.raises(ValueError, match=f"{field_name}: got 0"):
                ExpertLoader(
                    b.accelerator,
                    num_slots=numbers["num_slots"],
                    slot_numel=numbers["slot_numel"],
                    window=numbers["window"],
                    dtype=torch.float32,
                    source=b.weights.get,
                    next_use=lambda key: 0.0,
                )


# --- versions, errors, the end ----------------------------------------------------------------------------------------


def test_what_changed_while_in_flight_is_stale_when_it_lands() -> None:
    with bench(num_slots=2, window=2, step_by_step=True) as b:
        b.loader.set_queue(Phase.STAGE, KEYS[:2])
        b.change(KEYS[0])
        assert not b.loader.is_in_flight(KEYS[0]) and b.loader.is_in_flight(KEYS[1])
        b.land(2)
        assert b.loader.resident_keys() == [KEYS[1]]
        b.steps.release(1)
        b.loader.acquire(KEYS[1])  # the stale one's slot must do for what comes next
        assert torch.equal(b.loader.acquire(KEYS[0]), b.current(KEYS[0]))
        assert b.loader.stats.num_stale_loads == 1


def test_weights_in_use_cannot_be_invalidated() -> None:
    with bench() as b:
        fill(b, KEYS[:2])
        b.loader.acquire(KEYS[1])
        with pytest.raises(ValueError, match="which is acquired"):
            b.loader.invalidate()
        assert b.loader.resident_keys() == KEYS[:2]
        b.loader.release(KEYS[1])
        b.loader.invalidate()
        assert b.loader.resident_keys() == []


def test_the_wait_for_an_expert_in_flight_grows_with_what_is_ahead_of_it() -> None:
    with bench(num_slots=9, window=3, step_by_step=True) as b:
        b.loader.set_queue(Phase.STAGE, KEYS[:5])
        b.land(2)
        waits = [b.loader.estimated_wait_s(key) for key in KEYS[2:5]]
        assert waits[0] > 0.0 and waits[1] == pytest.approx(2 * waits[0]) and waits[2] == pytest.approx(3 * waits[0])
        assert b.loader.estimated_wait_s(KEYS[0]) == 0.0


def test_a_copy_that_fails_is_reported_to_whoever_computes() -> None:
    def fail() -> float:
        raise OSError("the link broke")

    with bench(copy_delay=fail) as b:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the link broke"):
                b.loader.acquire(KEYS[0])
        with pytest.raises(RuntimeError, match="the link broke"):
            b.loader.take_slot()
        b.settle()
        assert b.loader.resident_keys() == []


def test_close_waits_for_what_is_in_flight_and_can_be_repeated() -> None:
    with bench(copy_delay=lambda: 1e-3) as b:
        b.loader.set_queue(Phase.STAGE, KEYS)
        b.loader.close()
        b.loader.close()
        assert b.accelerator.num_in_flight == 0 and b.accelerator.allocated_bytes == 0
        for call in (lambda: b.loader.acquire(KEYS[0]), lambda: b.loader.set_queue(Phase.STAGE, KEYS)):
            with pytest.raises(RuntimeError, match="closed"):
                call()


def test_without_a_separate_memory_experts_are_computed_where_they_are() -> None:
    weights = {key: values(key, 0) for key in KEYS}
    loader = HostLoader(weights.get)
    loader.set_queue(Phase.EXPERT, KEYS)
    assert loader.is_resident(KEYS[0]) and not loader.is_in_flight(KEYS[0])
    assert loader.acquire(KEYS[0]) is weights[KEYS[0]]
    loader.release(KEYS[0])
    loader.invalidate()
    with pytest.raises(NotLoadableError):
        loader.acquire(UnitKey(9, 9))
    with pytest.raises(RuntimeError, match="in the store"):
        loader.take_slot()
    loader.close()
