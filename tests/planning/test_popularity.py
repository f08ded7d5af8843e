from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.planning.popularity import blend_history, routed_counts, skewness, solve_router_bias
from isthmus.spec.errors import IsthmusError


def test_skewness_is_the_mean_over_layers_of_squared_shares() -> None:
    assert skewness([[5, 5, 5, 5]]) == pytest.approx(0.25)
    assert skewness([[9, 0, 0, 0]]) == 1.0
    assert skewness([[5, 5, 5, 5], [9, 0, 0, 0], [0, 0, 0, 0]]) == pytest.approx(0.625)
    assert skewness([]) == 0.0


def logits(seed: int, num_tokens: int = 2000, num_experts: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_tokens, num_experts))


@pytest.mark.parametrize("target_g", [0.1, 0.2, 0.3, 0.4, 0.49])
@pytest.mark.parametrize("seed", [0, 1])
def test_routing_with_the_bias_reaches_the_target(target_g: float, seed: int) -> None:
    logits_TE = logits(seed)
    bias_E = solve_router_bias(logits_TE, 2, target_g, seed=seed)
    counts_E = routed_counts(logits_TE + bias_E, 2)
    assert counts_E.sum() == 4000, "every token meets exactly its two experts"
    assert skewness([counts_E]) == pytest.approx(target_g, abs=0.02)


def test_the_most_popular_expert_changes_with_the_seed_and_with_nothing_else() -> None:
    logits_TE = logits(0)
    biases = [solve_router_bias(logits_TE, 2, 0.3, seed=seed) for seed in range(6)]
    assert len({int(bias.argmax()) for bias in biases}) > 1
    assert np.array_equal(biases[0], solve_router_bias(logits_TE, 2, 0.3, seed=0))


def test_uniform_leaves_the_router_alone() -> None:
    assert not solve_router_bias(logits(0), 2, None, seed=0).any()


@pytest.mark.parametrize("target_g", [0.01, 0.6])
def test_a_target_out_of_reach_is_refused(target_g: float) -> None:
    with pytest.raises(IsthmusError, match=rf"skew: got {target_g}, wanted between 0\.06\d+, .* and 0\.5000"):
        solve_router_bias(logits(0), 2, target_g, seed=0)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(IsthmusError, match=r"skew: got 0\.75, came within 0\.250 of it with 2 tokens, .* give more"):
        solve_router_bias([[1.0, 0.0], [0.0, 1.0]], 1, 0.75, seed=0)


counts = st.lists(st.integers(0, 50), min_size=3, max_size=3)


@given(st.lists(counts, min_size=1, max_size=5))
def test_history_stays_a_distribution(steps: list[list[int]]) -> None:
    history = None
    for step in steps:
        history = blend_history(history, step)
        assert sum(history) == pytest.approx(1.0)


def test_history_weighs_the_past_and_ignores_empty_steps() -> None:
    history = blend_history(None, [3, 1])
    assert history == (0.75, 0.25)
    assert blend_history(history, [0, 8], keep=0.75) == (0.5625, 0.4375)
    assert blend_history(history, [0, 0]) == history
    assert blend_history(None, [0, 0]) == (0.5, 0.5)
    with pytest.raises(ValueError, match=r"history_E: got 2 experts, wanted 3"):
        blend_history(history, [1, 2, 3])
    with pytest.raises(ValueError, match=r"keep: got 1"):
        blend_history(history, [1, 2], keep=1)
