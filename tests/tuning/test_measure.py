"""How much memory a profile goes through."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from isthmus.spec.model import TensorSpec, UnitKey, UnitLayout
from isthmus.tuning import measure
from isthmus.tuning.measure import Work

MIB = 1 << 20
LAYOUT = UnitLayout(tensors=(TensorSpec(name="w", shape=(MIB,)),), dtype="fp32")
"""4 MiB of weights, 16 with gradients and moments."""


def work(**changes: Any) -> Work:
    nothing: Any = None
    model: Any = SimpleNamespace(layouts={UnitKey(0, number): LAYOUT for number in range(8)})
    fields: dict[str, Any] = {"in_turns": False, "in_step": True} | changes
    return Work(
        model=model, accelerator=nothing, example=nothing, max_tokens=1, num_cpu_threads=1, run=nothing, **fields
    )


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "last_level_cache_bytes", lambda: 48 * MIB)
    monkeypatch.setattr(measure, "free_memory_bytes", lambda: 1 << 40)


def test_it_is_a_share_of_what_is_held_and_never_less_than_asked() -> None:
    assert work().cold_bytes(1 / 4, 8 * MIB) == 32 * MIB
    assert work().cold_bytes(1 / 4, 40 * MIB) == 40 * MIB


def test_more_than_no_cache_holds_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert work().cold_bytes(1, 8 * MIB) == 96 * MIB
    monkeypatch.setattr(measure, "last_level_cache_bytes", lambda: 0)  # a system that does not tell
    assert work().cold_bytes(1, 8 * MIB) == 8 * MIB


def test_a_small_machine_keeps_most_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_memory_bytes", lambda: 160 * MIB)
    assert work().cold_bytes(1, 8 * MIB) == 20 * MIB


def test_a_run_that_only_decides_and_a_stage_that_comes_back_soon_take_the_least() -> None:
    assert work(in_step=False).cold_bytes(1, 8 * MIB) == 8 * MIB
    assert work(in_turns=True).cold_bytes(1, 8 * MIB) == 8 * MIB
