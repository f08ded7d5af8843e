from __future__ import annotations

import dataclasses
import re
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.planning.memory import (
    Blueprint,
    SavedStorages,
    accelerator_memory,
    activation_bytes,
    dense_bytes,
    host_bytes,
    least_slots,
    minimum_bytes,
    num_dense_buffers,
)
from isthmus.spec.errors import IsthmusError
from isthmus.spec.model import DENSE, OUTER_LAYER, ExpertSpec, ModelSpec, TensorSpec, UnitKey, UnitLayout
from isthmus.spec.plan import Stage


def blueprint(spec: ModelSpec, dtype: str = "fp32") -> Blueprint:
    """Every layer saves a storage of 1000 bytes, one of 10 that all share, and what the layer before has saved last."""
    layouts = {
        UnitKey(OUTER_LAYER, DENSE): UnitLayout(
            tensors=(TensorSpec(name="embed", shape=(100,)), TensorSpec(name="head", shape=(156,))), dtype=dtype
        )
    }
    for number, layer in enumerate(spec.layers):
        dense = TensorSpec(name=f"layer {number}", shape=(spec.dense_numel[number],))
        layouts[UnitKey(number, DENSE)] = UnitLayout(tensors=(dense,), dtype=dtype)
        if layer is not None:
            layout = UnitLayout(tensors=layer.tensors, dtype=dtype)
            layouts |= {UnitKey(number, expert): layout for expert in range(layer.num_experts)}
    saved = tuple({0: 10, number + 1: 1000, number: 1000 if number else 10} for number in range(spec.num_layers))
    return Blueprint(
        spec=spec,
        dtype=dtype,
        layouts=layouts,
        saved=SavedStorages(before={99: 5}, layers=saved, after={100: 7}),
        num_tokens=16,
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    extra_bytes=st.integers(0, 10**6),
    num_micro_batches=st.integers(1, 8),
    dtype=st.sampled_from(["fp32", "bf16"]),
    layers=st.sets(st.integers(0, 5), min_size=2),
)
def test_parts_never_exceed_the_budget(
    spec: ModelSpec, extra_bytes: int, num_micro_batches: int, dtype: str, layers: set[int]
) -> None:
    part = blueprint(spec, dtype).part(layers)
    minimum = minimum_bytes(part, num_micro_batches, "affinity")
    memory = accelerator_memory(part, num_micro_batches, "affinity", minimum + extra_bytes)
    assert memory.total_bytes <= memory.peak_bytes <= minimum + extra_bytes
    most = 4 * (len(layers - {0}) + 1)
    assert 2 <= memory.num_slots <= most
    assert memory.dense_bytes in (dense_bytes(part.layouts, 3), dense_bytes(part.layouts, 6))
    if memory.num_slots < most:
        assert memory.total_bytes + memory.slot_bytes > minimum + extra_bytes


def test_parts_are_those_of_the_model(spec: ModelSpec) -> None:
    memory = accelerator_memory(blueprint(spec).whole, 2, "affinity", 10**6)
    assert memory.slot_bytes == 384 * 4
    assert memory.dense_bytes == 2 * 4 * (1920 + 5 * 384 + 256)
    assert memory.activation_bytes == 2 * (10 + 6000 + 12) + 32 * 4 * (5 * 8 + 2 * (7 * 8 + 9 * 16))


def test_a_device_has_what_its_layers_need(spec: ModelSpec) -> None:
    first, middle, last = (blueprint(spec).part(layers) for layers in ({0, 1}, {2, 3}, {4, 5}))
    outer = UnitKey(OUTER_LAYER, DENSE)
    assert outer in first.layouts and outer not in {*middle.layouts, *last.layouts}
    assert [part.num_experts for part in (first, middle, last)] == [4, 8, 8]
    # What the layer before has saved last is the first layer's input, on either device.
    assert [part.saved_bytes for part in (first, middle, last)] == [2022, 3010, 3010]
    kinds = [host_bytes(part.layouts.values()) for part in (first, middle, last)]
    whole = host_bytes(blueprint(spec).whole.layouts.values())
    assert sum(kind["exp_avg"] for kind in kinds) == whole["exp_avg"]


def test_a_device_among_others_holds_gradients_of_a_stage_and_all_its_dense_parts(spec: ModelSpec) -> None:
    stages = (Stage(first_layer=1, last_layer=3),)
    alone, among = (blueprint(spec).part({1, 2, 3}, stages=own) for own in ((), stages))
    assert (alone.num_with_gradients, among.num_with_gradients) == (4, 12)
    assert least_slots("mobius", alone.experts, alone.num_with_gradients) == 4 + 4 + 1
    assert least_slots("mobius", among.experts, among.num_with_gradients) == 4 + 12 + 1
    budget = minimum_bytes(among, 2, "affinity")
    memory = accelerator_memory(among, 2, "affinity", budget)
    assert memory.is_dense_resident and memory.dense_bytes == dense_bytes(among.layouts, 3)
    assert accelerator_memory(among, 2, "affinity", 10**6).num_slots == 12 + 12


def test_layers_that_pass_through_need_as_many_buffers_as_micro_batches_can_be_spread_over(
    spec: ModelSpec, expert: ExpertSpec
) -> None:
    def num_buffers(pattern: str) -> int:
        layers = tuple(expert if letter == "m" else None for letter in pattern)
        return num_dense_buffers(dataclasses.replace(spec, layers=layers, num_layers=len(layers)))

    assert num_buffers("mmmmmm") == 3
    assert num_buffers("dmmmmm") == 3
    assert num_buffers("dddmmmmm") == 5
    assert num_buffers("dmdmdm") == 4
    assert num_buffers("mmmmmddd") == 5
    assert num_buffers("mm") == 2
    assert num_buffers("dddd") == 4


@given(pattern=st.lists(st.booleans(), min_size=1, max_size=16))
def test_no_two_layers_in_use_at_once_share_a_buffer(pattern: list[bool]) -> None:
    expert = ExpertSpec(
        hidden_size=1,
        intermediate_size=1,
        num_experts=1,
        top_k=1,
        has_gate=False,
        has_bias=False,
        is_transposed=False,
        activation="relu",
        tensors=(),
    )
    spec = ModelSpec(
        model_type="",
        architecture="",
        is_encoder_decoder=False,
        num_layers=len(pattern),
        hidden_size=1,
        vocab_size=1,
        layers=tuple(expert if is_moe else None for is_moe in pattern),
        dense_numel=(1,) * len(pattern),
        outer_numel=1,
    )
    num_buffers = num_dense_buffers(spec)
    stops = [0, *spec.moe_layers, len(pattern) - 1]
    for first, last in pairwise(stops):
        assert len({layer % num_buffers for layer in range(first, last + 1)}) == last + 1 - first
        # One of them is free for what comes next, unless nothing comes.
        assert num_buffers > last + 1 - first or num_buffers == len(pattern)


def test_layers_that_share_a_buffer_take_the_room_of_the_largest(spec: ModelSpec) -> None:
    layouts = blueprint(spec).layouts
    assert dense_bytes(layouts, 3) == 2 * 4 * (1920 + 2 * 384 + 256)
    assert dense_bytes(layouts, 1) == 2 * 4 * (1920 + 256)
    assert dense_bytes(layouts, 6) == dense_bytes(layouts, 9) == 2 * 4 * (1920 + 5 * 384 + 256)


def test_a_budget_below_the_minimum_is_refused_with_the_minimum(spec: ModelSpec) -> None:
    part = blueprint(spec).whole
    minimum = minimum_bytes(part, 2000, "affinity")
    with pytest.raises(IsthmusError, match=r"accelerator_memory: got .* wanted at least ([\d.]+) MiB") as caught:
        accelerator_memory(part, 2000, "affinity", minimum - 1)
    stated = re.search(r"at least ([\d.]+) MiB", str(caught.value))
    assert stated is not None
    assert accelerator_memory(part, 2000, "affinity", int(float(stated[1]) * 2**20)).num_slots >= 2


def test_policies_that_load_whole_layers_need_room_for_them(spec: ModelSpec) -> None:
    part = blueprint(spec).whole
    slots = {policy: minimum_bytes(part, 1, policy) // part.slot_bytes for policy in ("affinity", "mobius", "resident")}
    assert slots["mobius"] - slots["affinity"] == 9 - 2 and slots["resident"] - slots["affinity"] == 24 - 2


def test_activations_grow_with_micro_batches(spec: ModelSpec) -> None:
    part = blueprint(spec).whole
    assert activation_bytes(part, 6) == 3 * activation_bytes(part, 2)


def test_host_memory_is_sixteen_bytes_per_parameter_either_way(spec: ModelSpec) -> None:
    assert spec.num_parameters == 20 * 384 + 1920 + 5 * 384 + 256
    for dtype, master in (("fp32", 0), ("bf16", 4)):
        kinds = host_bytes(blueprint(spec, dtype).layouts.values())
        assert kinds["master"] == master * spec.num_parameters
        assert sum(kinds.values()) == 16 * spec.num_parameters
