"""Drawn popularity reaches the skewness asked for and keeps it; traces are replayed as recorded."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.simulation.tuning import tiny

from isthmus.planning.popularity import skewness
from isthmus.planning.popularity_trace import PopularityTrace, model_identity
from isthmus.simulation.tuning.popularity import (
    DrawnPopularity,
    TracedPopularity,
    shares_with_skewness,
    whole_counts,
)
from isthmus.spec.errors import IsthmusError


@given(st.integers(2, 64), st.integers(1, 4), st.floats(0.0, 0.98))
def test_shares_have_the_wanted_skewness(num_experts: int, top_k: int, at: float) -> None:
    most = 1 / min(top_k, num_experts)
    wanted = 1 / num_experts + at * (most - 1 / num_experts)
    shares = shares_with_skewness(num_experts, most, wanted)
    assert shares.sum() == pytest.approx(1) and (shares >= 0).all() and (np.diff(shares) <= 1e-12).all()
    assert np.square(shares).sum() == pytest.approx(wanted, abs=1e-6) and shares.max() <= most + 1e-9


@pytest.mark.parametrize("wanted", [0.1, 0.6])
def test_skewness_out_of_reach_is_refused(wanted: float) -> None:
    with pytest.raises(IsthmusError, match=r"popularity: got gini=.*, wanted 0\.2500, all 4 .*, to 0\.5000, all"):
        shares_with_skewness(4, 0.5, wanted)


def test_a_popularity_that_no_router_has_must_be_asked_for() -> None:
    spec = tiny.model(1, 8)
    with pytest.raises(IsthmusError, match=r"popularity: got gini=0\.8"):
        DrawnPopularity(spec, 0.8)
    counts = next(DrawnPopularity(spec, 0.8, is_capped=False).steps(1000))
    assert skewness([counts[0]]) == pytest.approx(0.8, abs=0.01)


def test_drift_keeps_tokens_and_skewness_and_moves_experts() -> None:
    spec = tiny.model(3, 8)
    steps = list(islice(DrawnPopularity(spec, 0.3, drift=0.5).steps(1000), 4))
    for counts in steps:
        assert all(c.sum() == 2000 and (c == np.floor(c)).all() for c in counts.values())
        assert skewness(list(counts.values())) == pytest.approx(0.3, abs=0.01)
    assert any((steps[0][layer] != steps[1][layer]).any() for layer in range(3))
    still = list(islice(DrawnPopularity(spec, 0.3).steps(1000), 2))
    assert all((still[0][layer] == still[1][layer]).all() for layer in range(3))


def test_drift_beyond_its_range_is_refused() -> None:
    with pytest.raises(IsthmusError, match=r"drift: got 1\.5, wanted 0 .* to 1"):
        DrawnPopularity(tiny.model(), 0.6, drift=1.5)


def test_a_trace_is_replayed_in_its_shares_and_starts_again() -> None:
    spec = tiny.model(2, 2, dense_layers=(0,))
    counts = np.array([[[3, 1]], [[0, 0]]])
    trace = PopularityTrace(model=model_identity(spec), num_experts=(2,), top_k=(2,), counts=counts)
    first, second, third = islice(TracedPopularity(spec, trace).steps(10), 3)
    assert first[1].tolist() == third[1].tolist() == [15, 5]
    # A step that recorded nothing says nothing.
    assert second[1].tolist() == [10, 10] and 0 not in first


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=9), st.integers(0, 1000))
def test_layers_are_rounded_together_as_each_alone(weights: list[float], total: int) -> None:
    shares_LE = np.stack([np.array(weights), np.array(weights)[::-1]]) / sum(weights)
    together_LE = whole_counts(shares_LE, total)
    assert (together_LE == np.stack([whole_counts(shares_E, total) for shares_E in shares_LE])).all()


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=9), st.integers(0, 1000))
def test_whole_counts_are_whole_and_all_there(weights: list[float], total: int) -> None:
    shares = np.array(weights) / sum(weights)
    counts = whole_counts(shares, total)
    assert counts.sum() == total and (counts == np.floor(counts)).all() and (np.abs(counts - shares * total) <= 1).all()
