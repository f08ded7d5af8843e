from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.planning.memory import accelerator_memory, host_memory, minimum_budget_bytes
from isthmus.spec.errors import IsthmusError
from isthmus.spec.model import ModelSpec


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    extra_bytes=st.integers(0, 10**6), activation_bytes=st.integers(0, 10**5), dtype=st.sampled_from(["fp32", "bf16"])
)
def test_parts_never_exceed_the_budget(spec: ModelSpec, extra_bytes: int, activation_bytes: int, dtype: str) -> None:
    minimum = minimum_budget_bytes(spec, dtype, activation_bytes=activation_bytes)
    memory = accelerator_memory(spec, dtype, budget_bytes=minimum + extra_bytes, activation_bytes=activation_bytes)
    assert memory.total_bytes <= minimum + extra_bytes
    assert 2 <= memory.num_slots <= 40
    if memory.num_slots < 40:
        assert memory.total_bytes + memory.slot_bytes > minimum + extra_bytes


def test_parts_are_those_of_the_model(spec: ModelSpec) -> None:
    memory = accelerator_memory(spec, "fp32", budget_bytes=10**6, activation_bytes=1000)
    assert memory.slot_bytes == 384 * 4
    assert memory.dense_bytes == 2 * 4 * (1920 + 5 * 384 + 256)


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
