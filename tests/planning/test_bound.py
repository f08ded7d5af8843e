from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.planning.bound import RESOURCES, StepBound, bound_from_seconds, step_bound
from isthmus.planning.horizon import plan_pass
from isthmus.planning.problem import CostModel
from isthmus.spec.model import ModelSpec
from isthmus.spec.profile import Profile


def random_pass(seed: int, num_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(constant_R, seconds_EAR, load_s_E) shaped like a pass: the last assignment loads."""
    random = np.random.default_rng(seed)
    load_s_E = np.full(num_experts, random.uniform(0.1, 2))
    seconds_EAR = random.random((num_experts, 2, 4))
    seconds_EAR[:, 1, 1] += load_s_E
    return random.random(4) * random.integers(0, 2), seconds_EAR, load_s_E


def options(seconds_AR: np.ndarray, load_s: float) -> np.ndarray:
    """(3, R): the two assignments, and the last with its weights kept from the pass before."""
    kept_R = seconds_AR[1].copy()
    kept_R[1] -= load_s
    return np.vstack([seconds_AR, kept_R])


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 4))
def test_no_assignment_is_faster_than_the_bound(seed: int, num_experts: int, slots: int) -> None:
    constant_R, seconds_EAR, load_s_E = random_pass(seed, num_experts)
    bound_s = bound_from_seconds(constant_R, seconds_EAR, load_s_E, slots).seconds
    choices = [options(seconds_EAR[e], load_s_E[e]) for e in range(num_experts)]
    for picked in product(range(3), repeat=num_experts):
        if picked.count(2) <= slots:
            loads_R = constant_R + sum(choices[e][option] for e, option in enumerate(picked))
            assert bound_s <= loads_R.max() * (1 + 1e-9)


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_the_bound_is_the_value_of_the_linear_program(seed: int) -> None:
    """One expert in any mixture of its options, on a grid of 1/48: the grid's best is just above the program's."""
    constant_R, seconds_EAR, load_s_E = random_pass(seed, 1)
    bound_s = bound_from_seconds(constant_R, seconds_EAR, load_s_E, 1).seconds
    steps = 48
    parts = np.array(
        [(*p, steps - sum(p)) for p in product(range(steps + 1), repeat=2) if sum(p) <= steps], dtype=np.float64
    )
    mixed_s = (constant_R + parts / steps @ options(seconds_EAR[0], load_s_E[0])).max(axis=1).min()
    assert bound_s <= mixed_s * (1 + 1e-9)
    assert bound_s >= mixed_s - 0.04


def test_one_busy_resource_is_named() -> None:
    nothing = np.zeros((0, 2, 4)), np.zeros(0)
    for number, name in enumerate(RESOURCES):
        bound = bound_from_seconds(np.eye(4)[number] * 3.0, *nothing, 0)
        assert (bound.limiting, bound.seconds) == (name, pytest.approx(3.0))
        assert getattr(bound, f"{name}_s") == 3.0


def bound_of(profile: Profile, spec: ModelSpec, counts: dict[int, list[int]], **changes: int) -> StepBound:
    arguments = {"num_tokens": 100, "num_slots": 4, "num_optimizer_parameters": 1000, **changes}
    return step_bound(profile, spec, counts, **arguments)


COUNTS = st.lists(st.lists(st.integers(0, 80), min_size=4, max_size=4), min_size=5, max_size=5)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=COUNTS, slots=st.integers(2, 12))
def test_no_planned_step_is_faster_than_the_bound(
    profile: Profile, spec: ModelSpec, counts: list[list[int]], slots: int
) -> None:
    costs, layers = CostModel(profile, spec), list(spec.moe_layers)
    counts_LE = dict(zip(layers, counts, strict=True))
    forward = [costs.problem(layer, counts_LE[layer], is_backward=False) for layer in layers]
    backward = [costs.problem(layer, counts_LE[layer], is_backward=True) for layer in reversed(layers)]
    planned_s = sum(plan_pass(problems, num_slots=slots).predicted_s for problems in (forward, backward))
    bound = step_bound(profile, spec, counts_LE, num_tokens=0, num_slots=slots, num_optimizer_parameters=0)
    assert bound.seconds <= planned_s * (1 + 1e-9)


def test_every_part_of_a_step_counts(profile: Profile, spec: ModelSpec) -> None:
    counts = {layer: [40, 30, 20, 10] for layer in spec.moe_layers}
    base_s = bound_of(profile, spec, counts).seconds
    assert base_s > 0
    busy = bound_of(profile, spec, counts, num_tokens=10**6)
    assert (busy.forward.limiting, busy.backward.limiting) == ("accelerator", "accelerator")
    assert busy.seconds >= 10**6 * 6 * 3e-6
    assert bound_of(profile, spec, counts, num_optimizer_parameters=10**9).forward.limiting == "cpu"
    assert bound_of(profile, spec, counts, dense_h2d_bytes=10**7).forward.limiting == "h2d"
    assert bound_of(profile, spec, counts, dense_backward_h2d_bytes=10**7).backward.limiting == "h2d"
    assert bound_of(profile, spec, counts, dense_d2h_bytes=10**7).backward.limiting == "d2h"
    assert bound_of(profile, spec, counts, num_slots=20).seconds <= base_s * (1 + 1e-4)


def test_only_backward_finds_weights_that_stayed(profile: Profile, spec: ModelSpec) -> None:
    counts = {layer: [40, 30, 20, 10] for layer in spec.moe_layers}
    without, many = (bound_of(profile, spec, counts, num_slots=slots) for slots in (0, 100))
    assert many.forward == without.forward
    assert many.backward.seconds < without.backward.seconds


def test_a_dense_layer_has_no_counts(profile: Profile, spec: ModelSpec) -> None:
    with pytest.raises(ValueError, match=r"counts_LE: got layer 0, which has no routed experts"):
        bound_of(profile, spec, {0: [1, 2, 3, 4]})
