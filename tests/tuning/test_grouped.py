"""Runs of experts that are computed at once: each expert is in one at most, and no program of them asks for a slot too
many."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isthmus.models.config import load_config
from isthmus.models.moe_model import MoeModel
from isthmus.models.tiny import tiny_config
from isthmus.reporting.recorder import Recorder
from isthmus.spec.model import UnitKey
from isthmus.training.random_state import random_state, restore_random_state
from isthmus.tuning.accelerator.emulated import EmulatedAccelerator
from isthmus.tuning.grouped import GroupedExperts, scratch_bytes, should_group
from isthmus.tuning.loader import ExpertLoader

NUM_EXPERTS, NUMEL = 8, 4


@settings(max_examples=60, deadline=None)
@given(num_slots=st.integers(2, 9), num_waves=st.integers(1, 2), seed=st.integers(0, 10_000))
def test_backward_in_runs_computes_every_expert_once_and_never_asks_for_a_slot_too_many(
    num_slots: int, num_waves: int, seed: int
) -> None:
    """As ``BackwardPass`` does it: gradients take slots while a run is held, and keep them until the last wave."""
    chance = random.Random(seed)
    weights = {UnitKey(0, expert): torch.full((NUMEL,), float(expert)) for expert in range(NUM_EXPERTS)}
    with EmulatedAccelerator(
        budget_bytes=1 << 20, recorder=Recorder(), h2d_bytes_per_s=1e12, d2h_bytes_per_s=1e12
    ) as accelerator:
        loader = ExpertLoader(
            accelerator,
            num_slots=num_slots,
            slot_numel=NUMEL,
            dtype=torch.float32,
            source=weights.get,
            window=2,
            next_use=lambda key: 0.0,
        )
        grouped = GroupedExperts(loader, {})
        for key in chance.sample(sorted(weights), min(num_slots, chance.randrange(NUM_EXPERTS + 1))):
            loader.acquire(key)
            loader.release(key)
        experts = chance.sample(range(NUM_EXPERTS), min(NUM_EXPERTS, num_slots - 1))
        gradients: dict[int, Tensor] = {}
        for _ in range(num_waves):
            compute_all(grouped, loader, experts, gradients)
        assert gradients.keys() == set(experts)
        assert loader.num_unheld == num_slots - len(gradients)
        for expert, slot in gradients.items():
            assert (slot == 100 + expert).all(), "a gradient's slot was given to somebody else"
            loader.give_slot(slot, None)
        loader.close()


def compute_all(
    grouped: GroupedExperts, loader: ExpertLoader, experts: list[int], gradients: dict[int, Tensor]
) -> None:
    in_order = grouped.in_slot_order(0, experts)
    assert sorted(in_order) == sorted(experts)
    takes_slot = [expert not in gradients for expert in in_order]
    done: list[int] = []

    def open_gradient(expert: int) -> None:
        if expert not in gradients:
            gradients[expert] = loader.take_slot().fill_(100 + expert)

    for run in grouped.runs(0, in_order, list(range(NUM_EXPERTS)), takes_slot=takes_slot):
        assert run.slots == sorted(run.slots) and run.counts == run.experts
        assert run.experts == in_order[in_order.index(run.experts[0]) :][: len(run.experts)], "rows must be neighbours"
        for expert in run.experts:
            open_gradient(expert)
        for expert, slot in zip(run.experts, run.slots, strict=True):
            assert (loader.buffer[slot] == expert).all()
        done += run.experts
    for expert in set(experts) - set(done):
        open_gradient(expert)
        assert (loader.acquire(UnitKey(0, expert)) == expert).all()
        loader.release(UnitKey(0, expert))
        done.append(expert)
    assert sorted(done) == sorted(experts)


@pytest.fixture
def make_model(tmp_path: Any) -> Any:
    def make(dtype: str, **overrides: int) -> MoeModel:
        tiny_config("mixtral", **overrides).save_pretrained(tmp_path)
        return MoeModel.build(load_config(tmp_path), dtype)

    return make


def test_experts_are_grouped_on_gpus_with_a_kernel_only(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = SimpleNamespace(device=torch.device("cuda", 0))
    cpu: Any = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = make_model("bf16")
    assert should_group(model, gpu) and not should_group(model, cpu)
    assert not should_group(make_model("fp32"), gpu)
    assert not should_group(make_model("bf16", intermediate_size=44), gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert not should_group(model, gpu)
    assert scratch_bytes(model) == 4 * 2 * 48 * 32 * 2


def test_a_micro_batch_has_its_own_random_numbers_on_the_device_too(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator()  # stands in for the device's
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: generator.get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: generator.set_state(state))

    def draw() -> list[float]:
        return [torch.rand(()).item(), torch.rand((), generator=generator).item()]

    device = torch.device("cuda", 0)
    before = random_state(device)
    wanted = draw()
    draw()
    restore_random_state(device, before)
    assert draw() == wanted
