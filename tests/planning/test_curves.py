from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.planning.curves import evaluate, monotone, scale
from isthmus.spec.profile import Curve

CURVE = Curve(num_tokens=(2, 4, 8), seconds=(1.0, 2.0, 6.0))


def test_no_tokens_take_no_time_and_few_take_as_long_as_the_first_measured() -> None:
    assert evaluate(CURVE, [0, 1, 2]).tolist() == [0.0, 1.0, 1.0]


def test_between_and_beyond_measured_counts_the_curve_is_straight() -> None:
    assert evaluate(CURVE, [[3, 6], [8, 12]]).tolist() == [[1.5, 4.0], [6.0, 10.0]]


def test_a_single_measurement_extends_in_proportion() -> None:
    assert evaluate(Curve(num_tokens=(4,), seconds=(2.0,)), [1, 4, 8]).tolist() == [2.0, 2.0, 4.0]


def test_a_curve_without_measurements_is_refused() -> None:
    with pytest.raises(ValueError, match=r"curve: got 0 token counts and 0 seconds"):
        evaluate(Curve(num_tokens=(), seconds=()), 3)


seconds = st.lists(st.integers(0, 1000).map(float), min_size=1, max_size=12)


@given(seconds)
def test_monotone_never_falls_and_keeps_the_sum(values: list[float]) -> None:
    curve = Curve(num_tokens=tuple(2**i for i in range(len(values))), seconds=tuple(values))
    result = monotone(curve)
    assert all(a <= b + 1e-9 for a, b in zip(result.seconds, result.seconds[1:], strict=False))
    assert sum(result.seconds) == pytest.approx(sum(values))


@given(seconds)
def test_monotone_leaves_a_rising_curve_alone(values: list[float]) -> None:
    curve = Curve(num_tokens=tuple(range(1, len(values) + 1)), seconds=tuple(sorted(values)))
    assert monotone(curve) == curve


def test_one_slow_measurement_does_not_lift_all_larger_counts() -> None:
    spiky = Curve(num_tokens=(1, 2, 4, 8), seconds=(1.0, 9.0, 2.0, 10.0))
    assert monotone(spiky).seconds == (1.0, 5.5, 5.5, 10.0)


def test_scale_multiplies_every_time() -> None:
    tokens = np.arange(20)
    assert np.allclose(evaluate(scale(CURVE, 4.0), tokens), 4 * evaluate(CURVE, tokens))
    with pytest.raises(ValueError, match=r"factor: got 0"):
        scale(CURVE, 0.0)
