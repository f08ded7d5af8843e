"""What interrupts a task is not the task's."""

from __future__ import annotations

import time

import pytest

from isthmus.profiling import crowding
from isthmus.profiling.crowding import Forgetting, measure_slowdown, usual_s


class Clock:
    now_s = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(crowding.time, "perf_counter", lambda: clock.now_s)
    return clock


class Pause:
    """On the test's clock: 5 s each time."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.num_calls, self.spent_s = clock, 0, 0.0

    def __call__(self, *, is_backward: bool = False) -> None:
        self.num_calls += 1
        self.clock.now_s += 5.0
        self.spent_s += 5.0


def test_usual_seconds_are_without_the_interruptions_before_and_in_between(clock: Clock) -> None:
    pause = Pause(clock)
    seconds = iter([100.0, 2.0, 9.0, 3.0, *[2.0] * 20])

    def task() -> None:
        taken_s = next(seconds)
        clock.now_s += taken_s / 2
        pause()
        clock.now_s += taken_s / 2

    # The first is to warm up; three are measured, and then the time is over.
    assert usual_s(task, pause) == pytest.approx(3.0)
    assert pause.num_calls == 1 + 2 * 3


def test_what_forgetting_takes_is_known() -> None:
    forget = Forgetting()
    forget()
    before_s = forget.spent_s
    forget(is_backward=True)
    assert forget.spent_s > before_s > 0


def test_the_others_turns_on_a_core_do_not_count() -> None:
    waiting = measure_slowdown(lambda: time.sleep(0.01), lambda: None, takes_turns=True)
    assert waiting.beside == waiting.alone >= 1.0


BY_ITSELF = (9.0, 2.0)
"""A run to warm up, and one, which is all that fits the time."""


def test_nothing_takes_less_than_by_itself(clock: Clock) -> None:
    seconds = iter([*BY_ITSELF, *[1.0] * 4, *BY_ITSELF, *[1.0] * 4, *BY_ITSELF])
    slowdown = measure_slowdown(lambda: _pass(clock, next(seconds)), lambda: None)
    assert slowdown.alone == slowdown.beside == 1.0


def test_a_slowdown_is_of_what_the_task_takes_before_and_after(clock: Clock) -> None:
    # By itself 2 s, then 4 and 8; after what leaves caches cold 6, beside another thread 18.
    seconds = iter([9.0, 2.0, 9.0, 6.0, 6.0, 6.0, 9.0, 4.0, 9.0, 18.0, 18.0, 18.0, 9.0, 8.0])
    slowdown = measure_slowdown(lambda: _pass(clock, next(seconds)), lambda: None)
    assert slowdown.alone == pytest.approx(6.0 / 3.0)
    assert slowdown.beside == pytest.approx(18.0 / 6.0)


def _pass(clock: Clock, seconds: float) -> None:
    clock.now_s += seconds
