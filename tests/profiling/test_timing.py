"""Under a quota pauses are in what is measured; without one nothing is repeated."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from isthmus.profiling import timing
from isthmus.profiling.timing import measure_curve, median_s, samples_s, window_of_pauses_s


def test_only_a_quota_below_the_threads_makes_pauses() -> None:
    assert window_of_pauses_s(None, 4) == 0
    assert window_of_pauses_s((200_000, 100_000), 2) == 0
    assert window_of_pauses_s((1_000, 2_200), 1) == pytest.approx(12 * 2.2e-3)
    assert window_of_pauses_s((150_000, 100_000), 2) == 0.1


def test_a_run_is_repeated_for_as_long_as_pauses_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, runs = 0.0, 0

    def task() -> None:
        # 1 ms of computing; every other run a pause of 3 ms.
        nonlocal now_s, runs
        runs += 1
        now_s += 1e-3 if runs % 2 else 4e-3

    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    monkeypatch.setattr(timing, "cpu_quota", lambda: (1_000, 4_000))
    assert median_s(task) == pytest.approx(2.5e-3, rel=0.1)
    monkeypatch.setattr(timing, "cpu_quota", lambda: None)
    assert sorted(samples_s(task, repeats=4, budget_s=1.0)) == pytest.approx([1e-3, 1e-3, 4e-3, 4e-3])


def test_the_median_counts_not_the_luckiest_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, seconds = 0.0, iter([0.9, 0.02, 0.05, 0.04, 0.06, 0.05])

    def task() -> None:
        nonlocal now_s
        now_s += next(seconds)

    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    monkeypatch.setattr(timing, "cpu_quota", lambda: None)
    assert median_s(task, repeats=5, budget_s=1.0) == pytest.approx(0.05)


def test_points_of_a_curve_are_measured_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, asked = 0.0, []

    def task(count: int) -> Callable[[], None]:
        asked.append(count)
        is_slow_second = len(asked) > 6  # the machine's third round takes three times as long

        def run() -> None:
            nonlocal now_s
            now_s += 1e-3 * count * (3 if is_slow_second else 1)

        return run

    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    monkeypatch.setattr(timing, "cpu_quota", lambda: None)
    curve = measure_curve(task, [1, 2, 400, 2_000, 4_000])
    # Points that take long have one round; the first above a second is the last.
    assert asked == [1, 2, 400, 2_000, 1, 2, 1, 2]
    assert curve.num_tokens == (1, 2, 400, 2_000)
    assert curve.seconds == pytest.approx((1e-3, 2e-3, 0.4, 2.0))
