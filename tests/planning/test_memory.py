from __future__ import annotations

import dataclasses
import re
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.planning.memory import (
    accelerator_memory,
    dense_bytes,
    host_memory,
    minimum_budget_bytes,
    num_dense_buffers,
)
from isthmus.spec.errors import IsthmusError
from isthmus.spec.model import ExpertSpec, ModelSpec


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    extra_bytes=st.integers(0, 10**6), activation_bytes=st.integers(0, 10**5), dtype=st.sampled_from(["fp32", "bf16"])
)
def test_parts_never_exceed_the_budget(spec: ModelSpec, extra_bytes: int, activation_bytes: int, dtype: str) -> None:
    minimum = minimum_budget_bytes(spec, dtype, activation_bytes=activation_bytes)
    memory = accelerator_memory(spec, dtype, budget_bytes=minimum + extra_bytes, activation_bytes=activation_bytes)
    assert memory.total_bytes <= minimum + extra_bytes
    assert 2 <= memory.num_slots <= 40
    assert memory.dense_bytes in (dense_bytes(spec, dtype), dense_bytes(spec, dtype, 3))
    if memory.num_slots < 40:
        assert memory.total_bytes + memory.slot_bytes > minimum + extra_bytes


def test_parts_are_those_of_the_model(spec: ModelSpec) -> None:
    memory = accelerator_memory(spec, "fp32", budget_bytes=10**6, activation_bytes=1000)
    assert memory.slot_bytes == 384 * 4
    assert memory.dense_bytes == 2 * 4 * (1920 + 5 * 384 + 256)


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
    assert dense_bytes(spec, "fp32", 3) == 2 * 4 * (1920 + 2 * 384 + 256)
    assert dense_bytes(spec, "fp32", 1) == 2 * 4 * (1920 + 256)
    assert dense_bytes(spec, "fp32", 6) == dense_bytes(spec, "fp32", 9) == dense_bytes(spec, "fp32")


def test_a_budget_below_the_minimum_is_refused_with_the_minimum(spec: ModelSpec) -> None:
    minimum = minimum_budget_bytes(spec, "fp32", activation_bytes=10**7, min_slots=3)
    with pytest.raises(IsthmusError, match=r"accelerator_memory: got .* wanted at least ([\d.]+) MiB") as caught:
        accelerator_memory(spec, "fp32", budget_bytes=minimum - 1, activation_bytes=10**7, min_slots=3)
    stated = re.search(r"at least ([\d.]+) MiB", str(caught.value))
    assert stated is not None
    enough = int(float(stated[1]) * 2**20)
    assert accelerator_memory(spec, "fp32", budget_bytes=enough, activation_bytes=10**7, min_slots=3).num_slots >= 3


def test_a_model_without_experts_is_refused(spec: ModelSpec) -> None:
    dense = dataclasses.replace(spec, layers=(None,) * 6)
    with pytest.raises(IsthmusError, match=r"model: Tiny has no routed experts"):
        accelerator_memory(dense, "fp32", budget_bytes=10**9, activation_bytes=0)


def test_host_memory_is_sixteen_bytes_per_parameter_either_way(spec: ModelSpec) -> None:
    assert spec.num_parameters == 20 * 384 + 1920 + 5 * 384 + 256
    for dtype, master in (("fp32", 0), ("bf16", 4)):
        kinds = host_memory(spec, dtype)
        assert kinds["master"] == master * spec.num_parameters
        assert sum(kinds.values()) == 16 * spec.num_parameters
