"""Where experts' gradients go, wave by wave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from isthmus.reporting.recorder import Recorder
from isthmus.spec.model import TensorSpec, UnitKey, UnitLayout
from isthmus.tuning.accelerator.emulated import EmulatedAccelerator
from isthmus.tuning.gradients import GradientSink
from isthmus.tuning.loader import ExpertLoader
from isthmus.tuning.optimizer import StoreOptimizer
from isthmus.tuning.parameter_store import ParameterStore

KEYS = [UnitKey(0, expert) for expert in range(3)]


@dataclass
class Case:
    accelerator: EmulatedAccelerator
    store: ParameterStore
    sink: GradientSink
    complete: list[UnitKey] = field(default_factory=list)


@pytest.fixture
def case() -> Iterator[Case]:
    accelerator = EmulatedAccelerator(
        budget_bytes=1 << 20, recorder=Recorder(), h2d_bytes_per_s=1e9, d2h_bytes_per_s=1e9
    )
    layout = UnitLayout(tensors=(TensorSpec(name="weight", shape=(4,)),), dtype="fp32")
    store = ParameterStore(dict.fromkeys(KEYS, layout), accelerator.allocate_host)
    loader = ExpertLoader(
        accelerator,
        num_slots=3,
        slot_numel=4,
        dtype=torch.float32,
        source=store.weight,
        window=1,
        next_use=lambda key: 0.0,
    )
    optimizer = StoreOptimizer(store, learning_rate=0.0)
    complete: list[UnitKey] = []
    yield Case(accelerator, store, GradientSink(accelerator, loader, optimizer, complete.append), complete)
    loader.close()
    optimizer.close()
    accelerator.close()


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_gradient_is_complete_after_its_last_wave_and_not_before(case: Case, on_cpu: bool) -> None:
    case.sink.expect({KEYS[0]: 2, KEYS[1]: 1})
    for wave, key in enumerate((KEYS[0], KEYS[1], KEYS[0])):
        flat, adds = case.sink.open(key, on_cpu=on_cpu)
        assert adds == (wave == 2)
        flat.copy_(flat + 1 if adds else torch.full((4,), float(wave + 1)))
        case.sink.close(key)
        case.accelerator.synchronize()
        assert case.complete == [[], [KEYS[1]], [KEYS[1], KEYS[0]]][wave]
    assert torch.equal(case.store.gradient(KEYS[0]), torch.full((4,), 2.0))
    assert torch.equal(case.store.gradient(KEYS[1]), torch.full((4,), 2.0))


def test_slots_are_free_again_for_other_gradients(case: Case) -> None:
    """Three slots, nine gradients."""
    for step in range(3):
        case.sink.expect(dict.fromkeys(KEYS, 1))
        for key in KEYS:
            flat, _ = case.sink.open(key, on_cpu=False)
            flat.fill_(step)
            case.sink.close(key)
        case.accelerator.synchronize()
    assert case.complete == KEYS * 3
