"""What optimizer steps take: of this order, and no less beside others."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest
import torch

from isthmus.spec.model import TensorSpec, UnitKey, UnitLayout
from isthmus.tuning.optimizer import StoreOptimizer
from isthmus.tuning.optimizer_times import measure_optimizer_slowdown, optimizer_s_per_parameter

LAYOUT = UnitLayout(tensors=(TensorSpec(name="w", shape=(1 << 16,)),), dtype="fp32")


def test_so_much_memory_is_stepped_and_the_first_of_four_runs_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, stepped = 0.0, []
    step_units, finish = StoreOptimizer.step_units, StoreOptimizer.finish_gradient
    monkeypatch.setattr("time.perf_counter", lambda: now_s)

    def step(self: StoreOptimizer, keys: Iterable[UnitKey]) -> None:
        nonlocal now_s
        own = list(keys)
        step_units(self, own)
        stepped.extend(own)
        # By runs: 9, 3, 1 and 2 ms a unit.
        now_s += 1e-3 * len(own) * (9, 3, 1, 2)[self.num_steps]

    def norm(self: StoreOptimizer, key: UnitKey) -> None:
        nonlocal now_s
        finish(self, key)
        now_s += 0.5e-3

    monkeypatch.setattr(StoreOptimizer, "step_units", step)
    monkeypatch.setattr(StoreOptimizer, "finish_gradient", norm)
    unit_bytes = 4 * 4 * (1 << 16)
    found = optimizer_s_per_parameter(LAYOUT, 8 * unit_bytes)
    assert len(stepped) == 4 * 9 and len(set(stepped)) == 9
    assert found == pytest.approx((2e-3 / (1 << 16), 0.5e-3 / (1 << 16)))


def test_others_compute_meanwhile_and_never_make_it_faster() -> None:
    threads = set()

    def other() -> None:
        threads.add(threading.current_thread().name)
        torch.ones(1 << 20).add_(1.0)

    slowdown = measure_optimizer_slowdown(LAYOUT, other, num_threads=1)
    assert threads == {"isthmus-profile-busy"}
    assert slowdown.alone == 1.0 <= slowdown.beside
