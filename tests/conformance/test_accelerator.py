"""What every accelerator must do, run against each: ``host``, ``emulated`` and, where there is a GPU, ``cuda``."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.reporting.recorder import Recorder
from isthmus.spec.errors import IsthmusError
from isthmus.tuning.accelerator import create
from isthmus.tuning.accelerator.base import Accelerator, AcceleratorMemoryError, Direction, NotResidentError
from isthmus.tuning.accelerator.emulated import EmulatedAccelerator

BUDGET_BYTES = 1 << 20
FAST = {"h2d_bytes_per_s": 1e12, "d2h_bytes_per_s": 1e12}


def make(kind: str, *, budget_bytes: int = BUDGET_BYTES, copy_delay: Callable[[], float] | None = None) -> Accelerator:
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    link = {**FAST, "copy_delay": copy_delay} if kind == "emulated" else {}
    return create(kind, budget_bytes=budget_bytes, recorder=Recorder(), **link)


@pytest.fixture(params=["host", "emulated", "cuda"])
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    with make(request.param) as accelerator:
        yield accelerator


@pytest.fixture(params=["emulated", "cuda"])
def separate(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    with make(request.param) as accelerator:
        yield accelerator


class Gate:
    """An event that the test lets happen."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.reached = threading.Event()

    def open(self) -> None:
        self._open.set()

    def is_done(self) -> bool:
        return self._open.is_set()

    def wait(self) -> None:
        self.reached.set()
        assert self._open.wait(10)


def copy_threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("isthmus-") and "cpu" not in t.name}


# --- memory -----------------------------------------------------------------------------------------------------------


def test_allocations_and_reservations_never_exceed_the_budget(accelerator: Accelerator) -> None:
    first = accelerator.allocate((BUDGET_BYTES // 2,), torch.uint8)
    accelerator.reserve(BUDGET_BYTES // 4)
    with pytest.raises(
        AcceleratorMemoryError, match=f"asked for {BUDGET_BYTES // 2} bytes with {BUDGET_BYTES * 3 // 4}"
    ):
        accelerator.allocate((BUDGET_BYTES // 2,), torch.uint8)
    with pytest.raises(AcceleratorMemoryError):
        accelerator.reserve(BUDGET_BYTES // 4 + 1)
    assert accelerator.allocated_bytes == BUDGET_BYTES * 3 // 4
    accelerator.free(first)
    accelerator.reserve(-BUDGET_BYTES // 4)
    assert (accelerator.allocated_bytes, accelerator.peak_bytes) == (0, BUDGET_BYTES * 3 // 4)
    assert accelerator.allocate((BUDGET_BYTES // 4,), torch.float32).device.type == accelerator.device.type


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 600)), max_size=30))
def test_allocated_bytes_are_the_sum_of_what_is_out(actions: list[tuple[bool, int]]) -> None:
    with make("emulated", budget_bytes=4096) as accelerator:
        out: list[torch.Tensor] = []
        peak = 0
        for is_allocation, number in actions:
            if is_allocation:
                fits = accelerator.allocated_bytes + 4 * number <= 4096
                try:
                    out.append(accelerator.allocate((number,), torch.float32))
                except AcceleratorMemoryError:
                    assert not fits
                else:
                    assert fits
            elif out:
                accelerator.free(out.pop(number % len(out)))
            assert accelerator.allocated_bytes == sum(4 * tensor.numel() for tensor in out) <= 4096
            peak = max(peak, accelerator.allocated_bytes)
        assert accelerator.peak_bytes == peak


def test_only_what_was_allocated_is_freed_and_only_once(accelerator: Accelerator) -> None:
    tensor = accelerator.allocate((8,), torch.float32)
    for wrong in (tensor[:4], torch.empty(8)):
        with pytest.raises(ValueError, match="wanted what allocate"):
            accelerator.free(wrong)
    accelerator.free(tensor)
    with pytest.raises(ValueError, match="freed already"):
        accelerator.free(tensor)
    with pytest.raises(ValueError, match="give back what was reserved"):
        accelerator.reserve(-1)


def test_host_memory_is_zeroed_and_not_counted(accelerator: Accelerator) -> None:
    slab = accelerator.allocate_host((3, 1000), torch.bfloat16)
    assert slab.device.type == "cpu" and slab.shape == (3, 1000) and not slab.any()
    assert slab.is_pinned() == (accelerator.name == "cuda")
    assert slab.data_ptr() % 4096 == 0
    assert accelerator.allocate_host((0,), torch.float32).numel() == 0
    assert accelerator.allocated_bytes == 0


# --- copies -----------------------------------------------------------------------------------------------------------


def test_copies_bring_the_data_there_and_back(accelerator: Accelerator) -> None:
    there, back = accelerator.allocate((1000,), torch.float32), accelerator.allocate_host((1000,), torch.float32)
    source = accelerator.allocate_host((1000,), torch.float32)
    source.copy_(torch.arange(1000.0))
    arrived = accelerator.copy(there, source, "h2d", name="there", kind="load_expert")
    accelerator.wait_for(arrived)
    accelerator.require_resident(there, there[10:20])
    there += 1.0
    accelerator.copy(back, there, "d2h", name="back", kind="gradient", after=accelerator.record()).wait()
    assert torch.equal(back, torch.arange(1000.0) + 1.0)
    assert accelerator.copied_bytes() == {"h2d": 4000, "d2h": 4000}
    accelerator.synchronize()
    spans = {span.lane: span for span in accelerator.recorder.timeline().spans if span.kind != "wait"}
    assert (spans["h2d"].name, spans["h2d"].kind, spans["h2d"].num_bytes) == ("there", "load_expert", 4000)
    assert (spans["d2h"].name, spans["d2h"].kind, spans["d2h"].num_bytes) == ("back", "gradient", 4000)
    assert spans["h2d"].end_s <= spans["d2h"].start_s + 1e-5


def test_copies_of_one_direction_end_in_the_order_asked_for(accelerator: Accelerator) -> None:
    host = accelerator.allocate_host((64,), torch.uint8)
    there = [accelerator.allocate((64,), torch.uint8) for _ in range(20)]
    ended: list[int] = []
    threads: set[threading.Thread] = set()

    def done(number: int) -> None:
        ended.append(number)
        threads.add(threading.current_thread())

    for number, tensor in enumerate(there):
        accelerator.copy(tensor, host, "h2d", on_done=lambda number=number: done(number))
    accelerator.synchronize()
    assert ended == list(range(20))
    assert threading.current_thread() not in threads


def test_on_done_may_queue_the_next_copy(accelerator: Accelerator) -> None:
    host, there = accelerator.allocate_host((64,), torch.uint8), accelerator.allocate((64,), torch.uint8)
    finished = threading.Event()
    left = [5]

    def again() -> None:
        left[0] -= 1
        if left[0]:
            accelerator.copy(there, host, "h2d", on_done=again)
        else:
            finished.set()

    accelerator.copy(there, host, "h2d", on_done=again)
    assert finished.wait(10)


def test_a_copy_starts_no_earlier_than_what_it_is_after(accelerator: Accelerator) -> None:
    host, there = accelerator.allocate_host((4,), torch.float32), accelerator.allocate((4,), torch.float32)
    gate = Gate()

    def late() -> None:
        host.fill_(7.0)
        gate.open()

    timer = threading.Timer(0.02, late)
    timer.start()
    event = accelerator.copy(there, host, "h2d", after=gate)
    accelerator.wait_for(event)
    timer.join()
    assert gate.is_done() and torch.equal(there.cpu(), torch.full((4,), 7.0))


def test_the_two_directions_run_at_once(separate: Accelerator) -> None:
    if separate.name == "cuda":
        pytest.skip("a foreign event blocks the caller of copy there")
    host, there = separate.allocate_host((2, 4), torch.float32), separate.allocate((2, 4), torch.float32)
    gate = Gate()
    blocked = separate.copy(there[0], host[0], "h2d", after=gate)
    separate.copy(host[1], there[1], "d2h").wait()
    assert not blocked.is_done()
    gate.open()
    blocked.wait()


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_a_copy_that_converts_or_has_gaps_is_refused(accelerator: Accelerator, direction: Direction) -> None:
    host = accelerator.allocate_host((4, 4), torch.float32)
    there = accelerator.allocate((4, 4), torch.float32)

    def copy(there: torch.Tensor, host: torch.Tensor) -> None:
        pair = (there, host) if direction == "h2d" else (host, there)
        accelerator.copy(*pair, direction)

    with pytest.raises(ValueError, match="shape of source"):
        copy(there, host[:2])
    with pytest.raises(ValueError, match="dtype of source"):
        copy(there, host.double())
    with pytest.raises(ValueError, match="contiguous"):
        copy(there[:, :2], host[:, :2])
    assert accelerator.copied_bytes() == {"h2d": 0, "d2h": 0}


def test_a_copy_in_the_wrong_direction_is_refused(separate: Accelerator) -> None:
    host, there = separate.allocate_host((4,), torch.float32), separate.allocate((4,), torch.float32)
    with pytest.raises(ValueError, match="wanted host memory for d2h"):
        separate.copy(there, host, "d2h")
    with pytest.raises(ValueError, match="wanted host memory for h2d"):
        separate.copy(host, there, "h2d")
    with pytest.raises(ValueError, match="direction"):
        separate.copy(there, host, "up")  # type: ignore[arg-type]


# --- residency --------------------------------------------------------------------------------------------------------


def test_what_is_not_resident_is_not_computed_on(separate: Accelerator) -> None:
    there = separate.allocate((4,), torch.float32)
    separate.require_resident(there, there[1:3])
    with pytest.raises(NotResidentError, match="never allocated"):
        separate.require_resident(there, torch.empty(4))
    separate.free(there)
    with pytest.raises(NotResidentError, match="freed"):
        separate.require_resident(there)


def test_memory_is_not_resident_while_a_copy_into_it_is_under_way() -> None:
    with make("emulated") as accelerator:
        slots, host = accelerator.allocate((3, 4), torch.float32), accelerator.allocate_host((4,), torch.float32)
        gate = Gate()
        event = accelerator.copy(slots[1], host, "h2d", after=gate)
        accelerator.require_resident(slots[0], slots[2])
        for tensor in (slots, slots[1], slots[1][2:], slots[:2], slots[:, 0]):
            with pytest.raises(NotResidentError, match="under way"):
                accelerator.require_resident(tensor)
        gate.open()
        accelerator.wait_for(event)
        accelerator.require_resident(slots)


def test_data_is_not_there_before_its_event() -> None:
    """Whoever forgets to wait must read something else than the data, or no test would notice."""
    delayed = threading.Event()
    go = threading.Event()

    def delay() -> float:
        delayed.set()
        assert go.wait(10)
        return 0.0

    with make("emulated", copy_delay=delay) as accelerator:
        there = accelerator.allocate((4,), torch.float32)
        there.zero_()
        event = accelerator.copy(there, torch.ones(4), "h2d")
        assert delayed.wait(10)
        assert not there.any() and not event.is_done()
        go.set()
        event.wait()
        assert there.all()


def test_compute_that_waits_is_in_the_timeline() -> None:
    with make("emulated", copy_delay=lambda: 0.005) as accelerator:
        there = accelerator.allocate((4,), torch.float32)
        accelerator.wait_for(accelerator.copy(there, torch.ones(4), "h2d", name="load"))
        with accelerator.compute("attention", kind="attention", num_tokens=3):
            there += 1.0
        spans = accelerator.recorder.timeline().spans
    assert [(span.lane, span.kind, span.num_tokens) for span in spans if span.lane == "accelerator"] == [
        ("accelerator", "wait", 0),
        ("accelerator", "attention", 3),
    ]


def test_emulated_link_time_is_latency_plus_bytes_over_rate_without_gaps() -> None:
    """Queued together, copies leave the link exactly one after the other, whenever threads happened to run."""
    recorder = Recorder()
    gate = Gate()
    with create(
        "emulated",
        budget_bytes=BUDGET_BYTES,
        recorder=recorder,
        h2d_bytes_per_s=1e8,
        d2h_bytes_per_s=2e8,
        latency_s=1e-4,
    ) as accelerator:
        there, host = accelerator.allocate((10_000,), torch.uint8), accelerator.allocate_host((10_000,), torch.uint8)
        for direction in ("h2d", "d2h"):
            pair = (there, host) if direction == "h2d" else (host, there)
            accelerator.copy(*pair, direction, after=gate)
            for _ in range(9):
                accelerator.copy(*pair, direction)
        opened_s = recorder.now_s()
        gate.open()
        accelerator.synchronize()
        end_s = recorder.now_s()
    for lane, seconds in (("h2d", 2e-4), ("d2h", 1.5e-4)):
        spans = [span for span in recorder.timeline().spans if span.lane == lane]
        assert opened_s <= spans[0].start_s
        assert all(span.end_s - span.start_s == pytest.approx(seconds, abs=1e-9) for span in spans)
        assert all(later.start_s == earlier.end_s for earlier, later in pairwise(spans))
        assert spans[-1].end_s <= end_s, "an event may not happen before the link has delivered"


def test_emulated_link_stays_busy_when_the_end_of_a_copy_queues_the_next() -> None:
    recorder = Recorder()
    with create(
        "emulated", budget_bytes=BUDGET_BYTES, recorder=recorder, h2d_bytes_per_s=1e8, d2h_bytes_per_s=1e8
    ) as accelerator:
        there, host = accelerator.allocate((10_000,), torch.uint8), accelerator.allocate_host((10_000,), torch.uint8)
        left = threading.Semaphore(9)
        finished = threading.Event()

        def again() -> None:
            if left.acquire(blocking=False):
                accelerator.copy(there, host, "h2d", on_done=again)
            else:
                finished.set()

        again()
        assert finished.wait(10)
    spans = recorder.timeline().spans
    assert len(spans) == 9 and all(later.start_s == earlier.end_s for earlier, later in pairwise(spans))


# --- errors and the end -----------------------------------------------------------------------------------------------


def test_an_error_in_a_copy_surfaces_where_it_is_waited_for() -> None:
    def fail() -> float:
        raise OSError("the link broke")

    with make("emulated", copy_delay=fail) as accelerator:
        there = accelerator.allocate((4,), torch.float32)
        called = threading.Event()
        event = accelerator.copy(there, torch.ones(4), "h2d", name="load", on_done=called.set)
        for wait in (event.wait, lambda: accelerator.wait_for(event), accelerator.synchronize):
            with pytest.raises(RuntimeError, match="the link broke"):
                wait()
        assert called.is_set()
        with pytest.raises(NotResidentError):
            accelerator.require_resident(there)


@pytest.mark.parametrize("kind", ["host", "emulated", "cuda"])
def test_an_error_in_on_done_surfaces_at_synchronize(kind: str) -> None:
    def fail() -> None:
        raise OSError("the listener broke")

    with make(kind) as accelerator:
        there, host = accelerator.allocate((4,), torch.float32), accelerator.allocate_host((4,), torch.float32)
        accelerator.copy(there, host, "h2d", on_done=fail).wait()
        with pytest.raises(RuntimeError, match="the listener broke"):
            accelerator.synchronize()


def test_close_ends_threads_gives_memory_back_and_can_be_repeated(accelerator: Accelerator) -> None:
    host, there = accelerator.allocate_host((4,), torch.float32), accelerator.allocate((4,), torch.float32)
    accelerator.copy(there, host, "h2d", on_done=lambda: None).wait()
    assert copy_threads()
    accelerator.close()
    accelerator.close()
    assert not copy_threads()
    assert accelerator.allocated_bytes == 0
    accelerator.free(there)
    with pytest.raises(RuntimeError, match="closed"):
        accelerator.allocate((4,), torch.float32)
    with pytest.raises(RuntimeError, match="closed"):
        accelerator.copy(there, host, "h2d")


def test_close_does_not_leave_anybody_waiting_for_copies_that_never_started() -> None:
    with make("emulated") as accelerator:
        host, there = accelerator.allocate_host((4,), torch.float32), accelerator.allocate((4,), torch.float32)
        gate = Gate()
        done: list[int] = []
        events = [
            accelerator.copy(there, host, "h2d", after=gate, on_done=lambda i=i: done.append(i)) for i in range(3)
        ]
        assert isinstance(accelerator, EmulatedAccelerator)
        assert gate.reached.wait(10)
        closing = threading.Thread(target=accelerator.close)
        closing.start()
        while not accelerator._engines["h2d"]._is_closed:
            time.sleep(1e-4)
        gate.open()
        closing.join(10)
        events[0].wait()
        for event in events[1:]:
            with pytest.raises(RuntimeError, match="closed before the copy started"):
                event.wait()
        assert done == [0, 1, 2]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_order_of_copies_and_delays_never_change_what_arrives(seed: int) -> None:
    """Chains host → slot → host with random delays: the events alone must keep each chain whole."""
    delays = random.Random(seed)
    with make("emulated", copy_delay=lambda: delays.random() * 1e-3) as accelerator:
        slot = accelerator.allocate((256,), torch.float32)
        sources = [torch.full((256,), float(number)) for number in range(6)]
        results = [torch.zeros(256) for _ in sources]
        left = None
        for source, result in zip(sources, results, strict=True):
            arrived = accelerator.copy(slot, source, "h2d", after=left)
            left = accelerator.copy(result, slot, "d2h", after=arrived)
        accelerator.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(sources, results, strict=True))


# --- choosing one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("tpu", {}, "accelerator: got 'tpu', wanted one of auto, cuda, emulated, host"),
        ("emulated", {"h2d_bytes_per_s": 1e9}, "d2h_bytes_per_s: got nothing"),
        ("emulated", {**FAST, "budget_bytes": None}, "say --accelerator-memory"),
        ("host", {"latency_s": 1e-5}, "latency_s: got a value with accelerator 'host'"),
        ("emulated", {**FAST, "latency_s": -1.0}, "latency_s: got -1.0"),
        ("emulated", {"h2d_bytes_per_s": 0.0, "d2h_bytes_per_s": 1.0}, "h2d_bytes_per_s: got 0.0"),
        ("host", {"budget_bytes": -1}, "budget_bytes: got -1"),
    ],
)
def test_a_choice_that_cannot_be_says_what_can(kind: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(kind, **{"budget_bytes": 1, "recorder": Recorder(), **options})


def test_cuda_where_there_is_none_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(IsthmusError, match="--accelerator host"):
        create("cuda", budget_bytes=1, recorder=Recorder())
    with create("auto", budget_bytes=1, recorder=Recorder()) as accelerator:
        assert accelerator.name == "host"
    with create("auto", budget_bytes=1, recorder=Recorder(), h2d_bytes_per_s=1e9, d2h_bytes_per_s=1e9) as accelerator:
        assert accelerator.name == "emulated"
