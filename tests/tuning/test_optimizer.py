"""The store's AdamW equals torch's on the same gradients, whatever the order, the chunks and the threads."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isthmus.spec.model import TensorSpec, UnitKey, UnitLayout
from isthmus.tuning import optimizer as optimizer_module
from isthmus.tuning.optimizer import NonFiniteGradient, StoreOptimizer
from isthmus.tuning.parameter_store import ParameterStore

SIZES = {UnitKey(-1, -1): 1000, UnitKey(0, -1): 333, UnitKey(0, 0): 4096, UnitKey(0, 1): 4097, UnitKey(1, 0): 17}
BETAS = (0.9, 0.95)


def make_store(dtype: str, sizes: dict[UnitKey, int] = SIZES) -> ParameterStore:
    layouts = {
        key: UnitLayout(tensors=(TensorSpec(name="w", shape=(size,)),), dtype=dtype) for key, size in sizes.items()
    }
    store = ParameterStore(layouts, lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    generator = torch.Generator().manual_seed(7)
    for key in store.keys:
        store.master(key).copy_(torch.randn(store.numel(key), generator=generator))
        store.publish(key)
    return store


def make_gradients(store: ParameterStore, step: int, missing: float) -> dict[UnitKey, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    chosen = random.Random(step)
    gradients = {
        key: torch.randn(store.numel(key), generator=generator).to(store.gradient(key).dtype) * (1 + step % 3)
        for key in store.keys
    }
    return {key: gradient for key, gradient in gradients.items() if chosen.random() >= missing}


def learning_rate_at(step: int) -> float:
    return 1e-2 / (1 + step)


def run_reference(
    store: ParameterStore, num_steps: int, clip_norm: float | None, weight_decay: float, missing: float
) -> tuple[dict[UnitKey, Tensor], list[float]]:
    """torch.optim.AdamW on FP32 copies; a unit without a gradient has a zero one, as an expert that met no token."""
    parameters = {key: torch.nn.Parameter(store.master(key).clone()) for key in store.keys}
    reference = torch.optim.AdamW(
        list(parameters.values()), lr=1.0, betas=BETAS, eps=1e-6, weight_decay=weight_decay, fused=True
    )
    norms = []
    for step in range(1, num_steps + 1):
        gradients = make_gradients(store, step, missing)
        for key, parameter in parameters.items():
            parameter.grad = gradients[key].float() if key in gradients else torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), clip_norm or math.inf)
        norms.append(norm.item())
        reference.param_groups[0]["lr"] = learning_rate_at(step)
        reference.step()
    return {key: parameter.detach() for key, parameter in parameters.items()}, norms


def run_store(
    store: ParameterStore, num_steps: int, clip_norm: float | None, weight_decay: float, missing: float
) -> list[float]:
    optimizer = StoreOptimizer(
        store, learning_rate=1.0, betas=BETAS, eps=1e-6, weight_decay=weight_decay, clip_norm=clip_norm
    )
    norms = []
    for step in range(1, num_steps + 1):
        for key, gradient in make_gradients(store, step, missing).items():
            optimizer.add_gradient(key, gradient)
            optimizer.finish_gradient(key)
        norms.append(optimizer.begin_step(step, learning_rate_at(step)))
        optimizer.step_units(store.keys)
        optimizer.end_step()
    return norms


@pytest.mark.parametrize(
    "dtype, clip_norm, weight_decay, missing, chunk_numel",
    [
        ("fp32", None, 0.0, 0.0, 1 << 19),
        ("fp32", 1.0, 0.1, 0.3, 1 << 19),
        ("fp32", 1.0, 0.0, 0.3, 512),
        ("bf16", None, 0.1, 0.3, 1 << 19),
        ("bf16", 1.0, 0.1, 0.3, 512),
    ],
)
def test_twenty_steps_equal_torch_adamw(
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    clip_norm: float | None,
    weight_decay: float,
    missing: float,
    chunk_numel: int,
) -> None:
    monkeypatch.setattr(optimizer_module, "CHUNK_NUMEL", chunk_numel)
    monkeypatch.setattr(optimizer_module, "MIN_CHUNK_NUMEL", min(chunk_numel, optimizer_module.MIN_CHUNK_NUMEL))
    store = make_store(dtype)
    expected, expected_norms = run_reference(store, 20, clip_norm, weight_decay, missing)
    norms = run_store(store, 20, clip_norm, weight_decay, missing)
    assert norms == pytest.approx(expected_norms, rel=2e-6)  # torch's own FP32 sum of squares is off by as much
    for key in store.keys:
        torch.testing.assert_close(store.master(key), expected[key], rtol=1e-6, atol=1e-7)
        assert torch.equal(store.weight(key), store.master(key).to(store.weight(key).dtype))


def test_without_clipping_fp32_is_bitwise_torch_adamw() -> None:
    # Whole cache lines: torch computes a shorter rest one by one, which may round differently.
    store = make_store("fp32", {UnitKey(0, expert): 16 * numel for expert, numel in enumerate((1, 64, 333))})
    expected, _ = run_reference(store, 20, None, 0.1, 0.0)
    run_store(store, 20, None, 0.1, 0.0)
    assert all(torch.equal(store.master(key), expected[key]) for key in store.keys)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(sorted(SIZES)), size=st.integers(1, 5), dtype=st.sampled_from(["fp32", "bf16"]))
def test_order_and_grouping_of_step_calls_do_not_matter(order: list[UnitKey], size: int, dtype: str) -> None:
    def run(groups: list[list[UnitKey]]) -> list[Tensor]:
        store = make_store(dtype)
        optimizer = StoreOptimizer(store, learning_rate=1e-2, clip_norm=1.0)
        for step in (1, 2):
            for key, gradient in make_gradients(store, step, 0.3).items():
                optimizer.add_gradient(key, gradient)
            optimizer.begin_step(step)
            for group in groups:
                optimizer.step_units(group)
            optimizer.end_step()
        return [tensor(key) for key in store.keys for tensor in (store.master, store.weight, store.exp_avg_sq)]

    expected = run([[key] for key in sorted(SIZES)])
    found = run([order[start : start + size] for start in range(0, len(order), size)])
    assert all(torch.equal(left, right) for left, right in zip(expected, found, strict=True))


def test_units_stepped_by_many_threads_take_each_step_once() -> None:
    alone, shared = make_store("bf16"), make_store("bf16")
    run_store(alone, 5, 1.0, 0.1, 0.3)
    optimizer = StoreOptimizer(shared, learning_rate=1.0, betas=BETAS, eps=1e-6, weight_decay=0.1, clip_norm=1.0)
    with ThreadPoolExecutor(4) as pool:
        for step in range(1, 6):
            gradients = make_gradients(shared, step, 0.3)
            list(pool.map(optimizer.add_gradient, gradients.keys(), gradients.values()))
            list(pool.map(optimizer.finish_gradient, gradients.keys()))
            optimizer.begin_step(step, learning_rate_at(step))
            list(pool.map(optimizer.step_unit, shared.keys * 3))
            optimizer.end_step()
    assert all(torch.equal(alone.master(key), shared.master(key)) for key in alone.keys)


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-7), ("bf16", 2**-7)])
def test_contributions_add_up_and_the_first_overwrites(dtype: str, tolerance: float) -> None:
    store = make_store(dtype)
    optimizer = StoreOptimizer(store, learning_rate=1e-3)
    key = UnitKey(0, 0)
    store.gradient(key).fill_(math.nan)  # what an earlier step left behind
    parts = [torch.randn(store.numel(key)) for _ in range(3)]
    destination, accumulate = optimizer.gradient_destination(key)
    assert destination.data_ptr() == store.gradient(key).data_ptr() and not accumulate
    destination.copy_(parts[0])
    optimizer.add_gradient(key, parts[1].to(destination.dtype))
    optimizer.finish_gradient(key)
    optimizer.add_gradient(key, parts[2])  # after finish_gradient: the norm is computed anew
    assert optimizer.gradient_destination(key)[1]
    torch.testing.assert_close(store.gradient(key).float(), sum(parts), rtol=tolerance, atol=4 * tolerance)
    norm = optimizer.begin_step(1)
    assert norm == pytest.approx(store.gradient(key).double().norm().item(), rel=1e-7)


def test_norm_of_a_large_unit_does_not_drift() -> None:
    key = UnitKey(0, 0)
    for dtype in ("fp32", "bf16"):
        store = make_store(dtype, {key: 3_000_001})
        optimizer = StoreOptimizer(store, learning_rate=1e-3)
        optimizer.add_gradient(key, torch.randn(3_000_001).to(store.gradient(key).dtype))
        assert optimizer.global_norm() == 0.0
        optimizer.finish_gradient(key)
        assert optimizer.global_norm() == pytest.approx(store.gradient(key).double().norm().item(), rel=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradient_steps_nothing_and_names_the_unit(value: float) -> None:
    store = make_store("bf16")
    optimizer = StoreOptimizer(store, learning_rate=1e-3, clip_norm=1.0)
    before = [store.master(key).clone() for key in store.keys]
    for key, gradient in make_gradients(store, 1, 0.0).items():
        optimizer.add_gradient(key, gradient)
    store.gradient(UnitKey(0, 1))[-1] = value
    with pytest.raises(
        NonFiniteGradient, match=r"step 1.*not finite in 1 units: UnitKey\(layer=0, expert=1\)"
    ) as error:
        optimizer.begin_step(1)
    assert error.value.units == (UnitKey(0, 1),)
    assert optimizer.pending() == ()
    assert all(torch.equal(store.master(key), master) for key, master in zip(store.keys, before, strict=True))
    optimizer.discard_gradients()
    assert optimizer.begin_step(1) == 0.0


def test_next_gradient_is_welcome_once_the_unit_has_been_stepped() -> None:
    store = make_store("fp32")
    optimizer = StoreOptimizer(store, learning_rate=1e-3)
    first, second = store.keys[:2]
    optimizer.begin_step(1)
    optimizer.step_unit(first)
    assert optimizer.is_stepped(first) and not optimizer.is_stepped(second)
    assert optimizer.pending() == store.keys[1:]
    assert not optimizer.gradient_destination(first)[1]
    with pytest.raises(RuntimeError, match="arrives before step 1 was taken"):
        optimizer.gradient_destination(second)
    with pytest.raises(RuntimeError, match="step 1 cannot end: 4 units"):
        optimizer.end_step()
    with pytest.raises(RuntimeError, match="step 1 is under way"):
        optimizer.state()
    optimizer.step_units(store.keys)
    optimizer.end_step()
    assert optimizer.gradient_destination(first)[1]  # the early contribution survived the end of the step
    assert optimizer.state() == {"num_steps": 1}


def test_steps_follow_one_another() -> None:
    store = make_store("fp32")
    optimizer = StoreOptimizer(store, learning_rate=1e-3)
    optimizer.load_state({"num_steps": 6})
    with pytest.raises(ValueError, match="step: got 6, want 7"):
        optimizer.begin_step(6)
    optimizer.begin_step(7)
    with pytest.raises(RuntimeError, match="step 7 has not ended"):
        optimizer.begin_step(7)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"learning_rate": -1.0}, "learning_rate: got -1.0"),
        ({"learning_rate": 1.0, "betas": (0.9, 1.0)}, "betas: got"),
        ({"learning_rate": 1.0, "clip_norm": 0.0}, "clip_norm: got 0.0"),
    ],
)
def test_wrong_setting_names_the_field(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoreOptimizer(make_store("fp32"), **arguments)


def test_wrong_gradient_shape_names_the_unit() -> None:
    with pytest.raises(ValueError, match=r"flat: got shape \(3,\) for UnitKey\(layer=0, expert=0\), want \(4096,\)"):
        StoreOptimizer(make_store("fp32"), learning_rate=1.0).add_gradient(UnitKey(0, 0), torch.zeros(3))


def test_torch_keeps_its_threads_elsewhere() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        optimizer = StoreOptimizer(make_store("fp32"), learning_rate=1.0, num_threads=3)
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
        found: list[int] = []
        optimizer._spread(lambda _: found.append(torch.get_num_threads()), range(6))
        assert found == [1] * 6
    finally:
        torch.set_num_threads(before)


def test_stores_of_several_processes_are_clipped_by_the_norm_of_all() -> None:
    gradients = [torch.full((64,), 3.0), torch.full((64,), 4.0)]
    total = sum(float(gradient.square().sum()) for gradient in gradients)
    for layer, gradient in enumerate(gradients):
        key = UnitKey(layer, 0)
        store = make_store("fp32", {key: 64})
        optimizer = StoreOptimizer(store, learning_rate=0.1, clip_norm=1.0, sum_over_ranks=lambda own: total)
        optimizer.add_gradient(key, gradient)
        assert optimizer.begin_step(1) == 40.0
        optimizer.step_units(store.keys)
        optimizer.close()
        torch.testing.assert_close(store.exp_avg(key), 0.1 * gradient / 40.0)


def test_a_norm_that_another_process_makes_infinite_stops_the_step_here_too() -> None:
    key = UnitKey(0, 0)
    store = make_store("fp32", {key: 4})
    before = store.master(key).clone()
    optimizer = StoreOptimizer(store, learning_rate=0.1, sum_over_ranks=lambda own: math.inf)
    optimizer.add_gradient(key, torch.ones(4))
    with pytest.raises(NonFiniteGradient, match="what is not finite is another process's"):
        optimizer.begin_step(1)
    optimizer.close()
    assert torch.equal(store.master(key), before)
