from __future__ import annotations

import dataclasses

import pytest

from isthmus.planning.problem import CostModel, LayerProblem
from isthmus.spec.model import ModelSpec
from isthmus.spec.profile import Profile


def test_forward_costs_come_from_the_profile(profile: Profile, spec: ModelSpec) -> None:
    problem = CostModel(profile, spec).problem(1, [0, 1, 64, 9], is_backward=False, resident=frozenset({2}))
    assert problem.cpu_s == pytest.approx((0.0, 2e-4, 65e-4, 10e-4))
    assert problem.accelerator_s == pytest.approx((0.0, 2e-5, 65e-5, 10e-5))
    assert problem.load_s == pytest.approx(1e-5 + 384 * 4 * 1e-6)
    assert problem.unload_s == 0.0
    assert problem.token_d2h_s == problem.token_h2d_s == pytest.approx(32e-6)
    assert problem.dense_s == pytest.approx(37 * 1e-6), "two choices per token, so half as many tokens"
    assert problem.is_absent(1) and not problem.is_absent(2)
    assert problem.max_on_accelerator == 4


def test_backward_moves_gradients_and_counts_both_directions_as_busy(profile: Profile, spec: ModelSpec) -> None:
    problem = CostModel(profile, spec).problem(1, [0, 1, 64, 9], is_backward=True)
    assert problem.cpu_s == pytest.approx((0.0, 4e-4, 130e-4, 20e-4))
    assert problem.load_s == pytest.approx(1e-5 + 1536 * 2e-6)
    assert problem.unload_s == pytest.approx(1e-5 + 1536 * 1.5e-6)
    assert problem.token_d2h_s == pytest.approx(2 * 32 * 1.5e-6), "hidden state and gradient"
    assert problem.token_h2d_s == pytest.approx(32 * 2e-6)


def test_bf16_halves_what_travels(profile: Profile, spec: ModelSpec) -> None:
    half = CostModel(dataclasses.replace(profile, dtype="bf16"), spec).problem(1, [1, 1, 1, 1], is_backward=False)
    assert half.load_s == pytest.approx(1e-5 + 768e-6)


def test_a_dense_layer_and_an_unknown_shape_are_refused(profile: Profile, spec: ModelSpec) -> None:
    with pytest.raises(ValueError, match=r"layer: got 0, which has no routed experts; wanted one of \(1, 2, 3, 4, 5\)"):
        CostModel(profile, spec).problem(0, [1], is_backward=False)
    with pytest.raises(ValueError, match=r"profile.experts: got \[\], wanted 'h8-i16-glu'"):
        CostModel(dataclasses.replace(profile, experts={}), spec).problem(1, [1], is_backward=False)


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 2, 1, 2 entries"):
        LayerProblem(counts=(1, 2), cpu_s=(1.0,), accelerator_s=(1.0, 1.0), load_s=1.0, max_on_accelerator=2)
