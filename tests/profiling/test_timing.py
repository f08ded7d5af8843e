"""Under a quota pauses are in what is measured; without one nothing is repeated."""

from __future__ import annotations

import pytest

from isthmus.profiling import timing
from isthmus.profiling.timing import fastest_s, window_of_pauses_s


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
    for quota, wanted_s in ((None, 1e-3), ((1_000, 4_000), 2.5e-3)):
        monkeypatch.setattr(timing, "cpu_quota", lambda quota=quota: quota)
        assert fastest_s(task) == pytest.approx(wanted_s, rel=0.1)
