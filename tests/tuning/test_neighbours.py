"""What is one of several processes of a host is measured beside the others, and kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isthmus.models.tiny import write_tiny_checkpoint
from isthmus.spec.profile import Profile, Slowdown
from isthmus.tuning import profile as module
from isthmus.tuning.profile import profile


@pytest.mark.parametrize(
    ("num_cores", "num_processes", "seats"),
    [(2, 1, [(4, 5)]), (2, 2, [(4,), (5,)]), (2, 4, [(4,), (5,)]), (1, 3, [(4,)]), (5, 2, [(4, 5), (6, 7, 8)])],
)
def test_as_many_measure_as_can_compute_at_once(
    num_cores: int, num_processes: int, seats: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4, 4 + num_cores)))
    assert module._seats(num_processes) == seats


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    write_tiny_checkpoint("mixtral", tmp_path / "model", 0, "fp32", num_hidden_layers=4)
    return tmp_path / "model"


def measured(model: Path, num_processes: int, **options: Any) -> Profile:
    sizes: dict[str, Any] = dict(dtype="fp32", seq_len=16, micro_batches=2)
    return profile(model, **sizes, **options, num_processes=num_processes, console=Console(quiet=True))


@pytest.mark.parametrize("options", [{"accelerator": "host"}, {"emulate": "h2d=1GB/s,d2h=1GB/s"}])
def test_one_of_two_is_measured_by_two_processes_once(
    model: Path, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = min(os.sched_getaffinity(0))
    monkeypatch.setattr(module, "_seats", lambda num_processes: [(core,)] * num_processes)
    found = measured(model, 2, **options)
    (times,) = found.experts.values()
    assert times.routing_forward is not None and times.routing_backward is not None
    assert min(found.dense_forward_s_per_token, found.optimizer_s_per_parameter, found.norm_s_per_parameter) > 0
    # It is measured as it is in a step, and only what a CPU worker leaves of the caches can slow it down.
    assert found.dense_slowdown.alone == 1.0
    assert "emulate" in options or found.dense_slowdown == Slowdown()
    assert (found.hardware.link is not None) == ("emulate" in options)
    kept = list((model.parent / "cache" / "profiles").iterdir())
    assert len(kept) == 1
    monkeypatch.setattr(module, "measure_together", lambda *_: pytest.fail("it was measured before"))
    assert measured(model, 2, **options) == found


def test_a_single_process_is_measured_here(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_together", lambda *_: pytest.fail("there is nobody beside"))
    (times,) = measured(model, 1, accelerator="host").experts.values()
    assert times.routing_forward is not None
