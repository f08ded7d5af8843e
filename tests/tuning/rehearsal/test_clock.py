"""The clock: threads share cores, wait for what happens, and do so in the same way every time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from isthmus.spec.profile import Slowdown
from isthmus.tuning.rehearsal.clock import Changes, Clock, Cores, Happening


def ends(clock: Clock, *tasks: Callable[[], object]) -> list[float]:
    """When each of the threads has ended."""
    found = [0.0] * len(tasks)

    def run(at: int) -> None:
        tasks[at]()
        found[at] = clock.now_s

    for at in range(len(tasks)):
        clock.start(lambda at=at: run(at))
    clock.run()
    return found


def test_threads_share_a_core_equally_and_have_one_each_where_there_are_two() -> None:
    clock = Clock()
    one = Cores(clock, 1)
    assert ends(clock, lambda: one.work(1.0), lambda: one.work(3.0)) == pytest.approx([2.0, 4.0])
    clock = Clock()
    two = Cores(clock, 2)
    assert ends(clock, lambda: two.work(1.0), lambda: two.work(3.0)) == pytest.approx([1.0, 3.0])


def test_who_comes_later_slows_down_who_is_there() -> None:
    clock = Clock()
    cores = Cores(clock, 1)

    def late() -> None:
        clock.sleep_until(1.0)
        cores.work(0.5)

    # One second alone, one at half the speed for both, half a second alone.
    assert ends(clock, lambda: cores.work(2.0), late) == pytest.approx([2.5, 2.0])


def test_threads_that_want_several_cores_count_as_many() -> None:
    clock = Clock()
    cores = Cores(clock, 2)
    assert ends(clock, lambda: cores.work(1.0, 2), lambda: cores.work(1.0, 2)) == pytest.approx([2.0, 2.0])


def test_work_is_slowed_by_what_is_beside_it_only_while_that_is_there() -> None:
    clock = Clock()
    cores, slow = Cores(clock, 2), Slowdown(alone=1.0, beside=2.0)
    assert ends(clock, lambda: cores.work(2.0, 1, slow), lambda: cores.work(1.0)) == pytest.approx([2.5, 1.0])
    clock = Clock()
    alone = Cores(clock, 2)
    assert ends(clock, lambda: alone.work(1.0, 1, Slowdown(alone=1.5, beside=2.0))) == pytest.approx([1.5])


def test_who_waits_goes_on_when_it_happens_and_who_comes_later_does_not_wait() -> None:
    clock = Clock()
    happening = Happening(clock)

    def late() -> None:
        clock.sleep_until(3.0)
        assert happening.is_done()
        happening.wait()

    def makes_it() -> None:
        clock.sleep_until(2.0)
        happening.happen()

    assert ends(clock, happening.wait, late, makes_it) == [2.0, 3.0, 2.0]


def test_every_change_wakes_all_who_wait_for_one() -> None:
    clock = Clock()
    changes, seen = Changes(clock), []

    def waits() -> None:
        with changes:
            while len(seen) < 2:
                changes.wait()

    def makes_them() -> None:
        for second in (1.0, 2.0):
            clock.sleep_until(second)
            seen.append(second)
            changes.notify_all()

    assert ends(clock, waits, waits, makes_them) == [2.0, 2.0, 2.0]


def test_what_a_thread_raises_ends_the_run() -> None:
    clock = Clock()

    def fails() -> None:
        clock.sleep_until(1.0)
        raise ValueError("no")

    clock.start(fails)
    with pytest.raises(ValueError, match="no"):
        clock.run()
