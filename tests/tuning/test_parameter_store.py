"""The parameter store: one aligned contiguous range per unit and kind, exactly as many bytes as the method needs."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isthmus.spec.model import TensorSpec, UnitKey, UnitLayout
from isthmus.tuning.parameter_store import ALIGNMENT_BYTES, KINDS, ParameterStore


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def layout(dtype: str, *shapes: tuple[int, ...]) -> UnitLayout:
    return UnitLayout(
        tensors=tuple(TensorSpec(name=f"t{i}", shape=shape) for i, shape in enumerate(shapes)), dtype=dtype
    )


layouts_strategy = st.dictionaries(
    st.builds(UnitKey, layer=st.integers(-1, 3), expert=st.integers(-2, 5)),
    st.builds(
        lambda dtype, shapes: layout(dtype, *shapes),
        st.sampled_from(["fp32", "bf16"]),
        st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=3),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(layouts=layouts_strategy, slab_bytes=st.integers(1, 4096))
def test_ranges_are_aligned_disjoint_and_of_the_right_dtype(
    layouts: dict[UnitKey, UnitLayout], slab_bytes: int
) -> None:
    store = ParameterStore(layouts, zeros, slab_bytes=slab_bytes)
    assert store.keys == tuple(sorted(layouts))
    spans = []
    for key in store.keys:
        unit_dtype = torch.float32 if layouts[key].dtype == "fp32" else torch.bfloat16
        flats = {kind: getattr(store, kind)(key) for kind in KINDS}
        assert {kind: flat.dtype for kind, flat in flats.items()} == {
            "weight": unit_dtype,
            "gradient": unit_dtype,
            "master": torch.float32,
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
        }
        for kind, flat in flats.items():
            assert flat.shape == (layouts[key].numel,) == (store.numel(key),)
            assert flat.is_contiguous()
            assert flat.data_ptr() % ALIGNMENT_BYTES == 0
            if not (kind == "master" and unit_dtype == torch.float32):
                spans.append((flat.data_ptr(), flat.data_ptr() + flat.nbytes))
        assert (store.master(key).data_ptr() == store.weight(key).data_ptr()) == (unit_dtype == torch.float32)
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_bytes_by_kind_are_what_the_method_needs() -> None:
    layouts = {
        UnitKey(0, -1): layout("fp32", (16, 3), (16,)),  # 64 parameters
        UnitKey(0, 0): layout("bf16", (32, 4)),  # 128 parameters
        UnitKey(0, 1): layout("bf16", (33,)),  # 33, padded to 64
    }
    store = ParameterStore(layouts, zeros)
    assert store.bytes_by_kind() == {
        "weight": 64 * 4 + 192 * 2,
        "master": 192 * 4,
        "gradient": 64 * 4 + 192 * 2,
        "exp_avg": 256 * 4,
        "exp_avg_sq": 256 * 4,
    }
    assert store.total_bytes == sum(store.bytes_by_kind().values())


def test_host_allocations_are_few_and_only_weights_and_gradients() -> None:
    asked: list[tuple[tuple[int, ...], torch.dtype]] = []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        asked.append((shape, dtype))
        return zeros(shape, dtype)

    units = {UnitKey(0, expert): layout("bf16", (1024,)) for expert in range(8)}
    store = ParameterStore(units, allocate, slab_bytes=3 * 4096)
    # Three units to a slab (4096 bytes of FP32 each), once for weights and once for gradients, and one cache line over.
    assert asked == [((num_units * 1024 + 32,), torch.bfloat16) for num_units in (3, 3, 3, 3, 2, 2)]
    assert store.weight(UnitKey(0, 1)).data_ptr() == store.weight(UnitKey(0, 0)).data_ptr() + 2048


def test_unit_larger_than_a_slab_is_not_split() -> None:
    store = ParameterStore({UnitKey(0, 0): layout("fp32", (100, 100))}, zeros, slab_bytes=64)
    assert store.named(UnitKey(0, 0))["t0"].shape == (100, 100)


def test_named_views_lie_one_after_the_other_in_the_range() -> None:
    key = UnitKey(2, 1)
    store = ParameterStore({key: layout("bf16", (2, 3), (), (4,))}, zeros)
    for kind in KINDS:
        flat = getattr(store, kind)(key)
        flat.copy_(torch.arange(11))
        views = store.named(key, kind)
        assert {name: tuple(view.shape) for name, view in views.items()} == {"t0": (2, 3), "t1": (), "t2": (4,)}
        assert torch.cat([view.flatten() for view in views.values()]).tolist() == list(range(11))
        views["t2"].zero_()
        assert flat[7:].tolist() == [0] * 4


def test_publish_rounds_the_master_into_the_weight() -> None:
    low, full = UnitKey(0, 0), UnitKey(0, -2)
    store = ParameterStore({low: layout("bf16", (64,)), full: layout("fp32", (64,))}, zeros)
    values = torch.randn(64)
    for key in store.keys:
        store.master(key).copy_(values)
        store.publish(key)
    assert torch.equal(store.weight(low), values.bfloat16())
    assert torch.equal(store.weight(full), values)


def test_moments_and_masters_cost_no_memory_before_they_are_written() -> None:
    script = """
import torch
from isthmus.spec.model import TensorSpec, UnitKey, UnitLayout
from isthmus.tuning.parameter_store import ParameterStore
def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
unit = UnitLayout(tensors=(TensorSpec(name="w", shape=(64 << 20,)),), dtype="bf16")
before = resident_bytes()
store = ParameterStore({UnitKey(0, 0): unit}, lambda shape, dtype: torch.empty(shape, dtype=dtype))
assert float(store.exp_avg(UnitKey(0, 0))[-1]) == 0.0
print(resident_bytes() - before)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 64 << 20  # of 768 MiB


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ParameterStore({UnitKey(0, 0): layout("fp16", (1,))}, zeros), r"dtype: got 'fp16', want one of"),
        (
            lambda: ParameterStore({UnitKey(0, 0): layout("fp32", (1,))}, zeros).named(UnitKey(0, 0), "momentum"),
            r"kind: got 'momentum', want one of",
        ),
    ],
)
def test_wrong_input_names_the_field(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@settings(max_examples=60, deadline=None)
@given(layouts=layouts_strategy, slab_bytes=st.integers(1, 4096), data=st.data())
def test_runs_cover_the_units_once_and_their_spans_hold_them_and_zeros(
    layouts: dict[UnitKey, UnitLayout], slab_bytes: int, data: st.DataObject
) -> None:
    store = ParameterStore(layouts, zeros, slab_bytes=slab_bytes)
    wanted = data.draw(st.lists(st.sampled_from(sorted(layouts)), unique=True)) if layouts else []
    runs = store.runs(wanted)
    assert sorted(key for run in runs for key in run) == sorted(wanted)
    for kind in KINDS:
        for key in store.keys:
            getattr(store, kind)(key).fill_(1)
        for run in runs:
            span = store.span(kind, run)
            assert span.sum() == sum(store.numel(key) for key in run)
            assert span.data_ptr() == getattr(store, kind)(run[0]).data_ptr()
            assert span.numel() % (ALIGNMENT_BYTES // span.itemsize) == 0


def test_equal_units_of_a_layer_are_one_run() -> None:
    units = {UnitKey(layer, expert): layout("bf16", (64,)) for layer in range(2) for expert in range(4)}
    store = ParameterStore(units, zeros)
    assert store.runs(reversed(store.keys)) == [list(store.keys)]
    assert store.runs([UnitKey(0, 3), UnitKey(0, 0), UnitKey(0, 1)]) == [
        [UnitKey(0, 0), UnitKey(0, 1)],
        [UnitKey(0, 3)],
    ]
