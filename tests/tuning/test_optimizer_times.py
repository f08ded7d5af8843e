"""What optimizer steps take: of this order, and no less beside others."""

from __future__ import annotations

import threading

import torch

from isthmus.spec.model import TensorSpec, UnitLayout
from isthmus.tuning.optimizer_times import measure_optimizer_slowdown, optimizer_s_per_parameter

LAYOUT = UnitLayout(tensors=(TensorSpec(name="w", shape=(1 << 16,)),), dtype="fp32")


def test_what_is_chosen_of_three_runs_counts() -> None:
    seen: list[list[float]] = []

    def choose(seconds: list[float]) -> float:
        seen.append(sorted(seconds))
        return 1.0

    found = optimizer_s_per_parameter(LAYOUT, choose)
    assert [len(each) for each in seen] == [3, 3] and all(each[0] > 0 for each in seen)
    assert found[0] == found[1] and 0 < found[0] < 1e-7  # one second, by all parameters


def test_others_compute_meanwhile_and_never_make_it_faster() -> None:
    threads = set()

    def other() -> None:
        threads.add(threading.current_thread().name)
        torch.ones(1 << 20).add_(1.0)

    slowdown = measure_optimizer_slowdown(LAYOUT, other, num_threads=1)
    assert threads == {"isthmus-profile-busy"}
    assert slowdown.alone == 1.0 <= slowdown.beside
