"""When the dense parts of layers that share buffers come, go, and may be used."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from isthmus.models.moe_model import MoeModel
from isthmus.models.tiny import tiny_config
from isthmus.reporting.recorder import Recorder
from isthmus.spec.model import OUTER_LAYER, UnitKey
from isthmus.tuning.accelerator.base import AcceleratorMemoryError, Event, NotResidentError
from isthmus.tuning.accelerator.emulated import EmulatedAccelerator
from isthmus.tuning.dense import DenseUnits, dense_bytes
from isthmus.tuning.optimizer import StoreOptimizer
from isthmus.tuning.parameter_store import ParameterStore

NUM_LAYERS, NUM_BUFFERS = 8, 3


class Gated(EmulatedAccelerator):
    """Notes the loads asked for; gradients leave only once ``gate`` is set."""

    def __init__(self, budget_bytes: int) -> None:
        super().__init__(budget_bytes=budget_bytes, recorder=Recorder(), h2d_bytes_per_s=1e12, d2h_bytes_per_s=1e12)
        self.gate = threading.Event()
        self.gate.set()
        self.loads: list[str] = []

    def copy(self, destination: Tensor, source: Tensor, direction, *, name: str = "", **named) -> Event:  # type: ignore[override]
        if direction == "h2d":
            self.loads.append(name.removeprefix("dense "))
        return super().copy(destination, source, direction, name=name, **named)

    def _transfer(self, destination: Tensor, source: Tensor, direction, *rest) -> float:  # type: ignore[override]
        if direction == "d2h":
            assert self.gate.wait(10)
        return super()._transfer(destination, source, direction, *rest)


@dataclass
class Bench:
    """Dense units whose weights on the host say which layer they are of."""

    model: MoeModel
    store: ParameterStore
    accelerator: Gated
    units: DenseUnits
    completed: list[UnitKey]

    def upload_all(self) -> None:
        self.units.begin_step()
        for layer in range(OUTER_LAYER, NUM_LAYERS):
            self.units.upload(layer)

    def forward(self, layers: range = range(NUM_LAYERS)) -> None:
        self.units.begin_forward()
        self.units.enter_forward(OUTER_LAYER)
        for layer in layers:
            self.units.enter_forward(layer)
            assert self.seen(layer) == {float(layer)}
            self.units.leave_forward(layer)

    def parameters(self, layer: int) -> list[torch.nn.Parameter]:
        return [parameter for key in self.units.of_layer(layer) for parameter in self.model.parameters_of(key).values()]

    def seen(self, layer: int) -> set[float]:
        return {value for parameter in self.parameters(layer) for value in parameter.detach().unique().tolist()}


@contextlib.contextmanager
def make_bench(num_buffers: int, *, less_bytes: int = 0, model: MoeModel | None = None) -> Iterator[Bench]:
    model = model or MoeModel.build(tiny_config("deepseek_v3", num_hidden_layers=NUM_LAYERS), "fp32")
    store = ParameterStore(model.layouts, lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    for key in store.keys:
        store.weight(key).fill_(key.layer)
    optimizer = StoreOptimizer(store, learning_rate=0.1)
    completed: list[UnitKey] = []
    with Gated(dense_bytes(store, num_buffers) - less_bytes) as accelerator:
        units = DenseUnits(model, store, accelerator, optimizer, completed.append, num_buffers=num_buffers)
        try:
            yield Bench(model, store, accelerator, units, completed)
        finally:
            accelerator.gate.set()
            accelerator.synchronize()
            optimizer.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with make_bench(NUM_BUFFERS) as bench:
        yield bench


@pytest.mark.parametrize("num_buffers", [1, 3, NUM_LAYERS])
def test_memory_is_what_was_announced_and_comes_back(num_buffers: int) -> None:
    with make_bench(num_buffers) as bench:
        assert bench.accelerator.allocated_bytes == bench.accelerator.budget_bytes
        bench.units.free()
        assert bench.accelerator.allocated_bytes == 0
        weights = {bench.store.weight(key).untyped_storage().data_ptr() for key in bench.units.keys}
        for layer in range(OUTER_LAYER, NUM_LAYERS):
            assert all(p.untyped_storage().data_ptr() in weights and p.grad is None for p in bench.parameters(layer))
    with pytest.raises(AcceleratorMemoryError), make_bench(num_buffers, less_bytes=1):
        pass


def test_layers_are_loaded_as_those_before_them_leave(bench: Bench) -> None:
    bench.upload_all()
    loads = bench.accelerator.loads
    assert sorted(loads) == ["L-1", "L0", "L1", "L2"]
    bench.units.begin_forward()
    for layer in range(NUM_LAYERS):
        bench.units.enter_forward(layer)
        num_loads = len(loads)
        bench.units.leave_forward(layer)
        assert loads[num_loads:] == [f"L{layer + NUM_BUFFERS}"] * (layer + NUM_BUFFERS < NUM_LAYERS)
    loads.clear()
    for layer in reversed(range(NUM_LAYERS)):
        bench.units.enter_backward(layer)
        assert bench.seen(layer) == {float(layer)}
        bench.units.leave_backward(layer)
    assert loads == [f"L{layer}" for layer in reversed(range(NUM_LAYERS - NUM_BUFFERS))]


def test_a_layer_waits_for_its_buffer_and_for_its_step(bench: Bench) -> None:
    bench.upload_all()
    bench.forward()
    bench.units.begin_step()
    loads = bench.accelerator.loads
    loads.clear()
    for layer in (OUTER_LAYER, 4, 3, 0):
        bench.units.upload(layer)
    assert loads == ["L-1", "L0"]
    bench.units.begin_forward()
    bench.units.enter_forward(0)
    with pytest.raises(NotResidentError, match=r"layer 1: .* Wait for its optimizer step"):
        bench.units.enter_forward(1)
    bench.units.leave_forward(0)
    assert loads == ["L-1", "L0", "L3"]
    bench.units.upload(1)
    bench.units.enter_forward(1)
    bench.units.leave_forward(1)
    assert loads == ["L-1", "L0", "L3", "L1", "L4"]


def test_a_layer_cannot_be_entered_before_its_buffer_was_left(bench: Bench) -> None:
    bench.upload_all()
    bench.units.begin_forward()
    bench.units.enter_forward(0)
    with pytest.raises(NotResidentError, match=r"layer 3: .* the buffer is layer 0's"):
        bench.units.enter_forward(3)


def test_a_copy_under_way_is_seen(bench: Bench) -> None:
    late = threading.Event()
    bench.accelerator.copy_delay = lambda: float(late.wait(10))
    bench.upload_all()
    with pytest.raises(NotResidentError, match="still under way"):
        bench.units.require(0)
    bench.accelerator.copy_delay = None
    late.set()


@pytest.mark.parametrize("num_layers", [NUM_LAYERS, 2, 5])
def test_a_pass_may_start_again_after_any_other(num_layers: int, bench: Bench) -> None:
    bench.upload_all()
    for _ in range(3):
        bench.forward(range(num_layers))


def test_units_of_either_dtype_pass_through() -> None:
    config = tiny_config("nllb-moe", encoder_layers=4, decoder_layers=4)
    with make_bench(NUM_BUFFERS, model=MoeModel.build(config, "bf16")) as bench:
        assert {parameter.dtype for parameter in bench.parameters(7)} == {torch.bfloat16, torch.float32}
        assert bench.accelerator.allocated_bytes == bench.accelerator.budget_bytes
        bench.upload_all()
        bench.forward()


def test_weights_are_those_of_the_last_step(bench: Bench) -> None:
    bench.upload_all()
    bench.forward()
    for key in bench.units.keys:
        bench.store.weight(key).fill_(key.layer + 100)
    bench.upload_all()
    bench.units.begin_forward()
    for layer in range(NUM_LAYERS):
        bench.units.enter_forward(layer)
        assert bench.seen(layer) == {layer + 100.0}
        bench.units.leave_forward(layer)


def test_gradients_leave_before_their_memory_is_used_again(bench: Bench) -> None:
    bench.upload_all()
    bench.forward()
    bench.units.begin_backward()
    bench.accelerator.gate.clear()
    for layer in reversed(range(NUM_LAYERS)):
        if layer == NUM_LAYERS - NUM_BUFFERS - 1:
            # The first that finds gradients in its memory: they begin to leave while it waits.
            threading.Timer(0.05, bench.accelerator.gate.set).start()
        bench.units.enter_backward(layer)
        for parameter in bench.parameters(layer):
            assert parameter.grad is not None and not parameter.grad.any()
            parameter.grad.add_(layer + 0.5)
        bench.units.leave_backward(layer)
    bench.accelerator.synchronize()
    assert bench.completed == [key for layer in reversed(range(NUM_LAYERS)) for key in bench.units.of_layer(layer)]
    for key in bench.completed:
        assert bench.store.gradient(key).unique().tolist() == [key.layer + 0.5]
