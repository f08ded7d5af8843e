"""Measured curves as functions: seconds of one expert at any token count, and the repair of noisy measurements."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isthmus.spec.profile import Curve


def evaluate(curve: Curve, num_tokens: ArrayLike) -> NDArray[np.float64]:
    """Seconds at ``num_tokens`` (any shape, counts of 0 or more), same shape, float64.

    No tokens take 0 seconds. Between two measured counts the seconds follow a straight line; below the first count
    they are the first value (an expert's weights are read whatever the count); beyond the last they go on with the
    last slope (with one measured count: in proportion). This is the lookup table of APTMoE, section 3, on a geometric
    grid.
    """
    _require_grid(curve)
    tokens = np.asarray(num_tokens, dtype=np.float64)
    grid = np.asarray(curve.num_tokens, dtype=np.float64)
    seconds = np.asarray(curve.seconds, dtype=np.float64)
    if len(grid) > 1:
        slope = (seconds[-1] - seconds[-2]) / (grid[-1] - grid[-2])
    else:
        slope = seconds[-1] / grid[-1]
    result = np.interp(tokens, grid, seconds) + slope * np.maximum(tokens - grid[-1], 0.0)
    return np.where(tokens > 0, result, 0.0)


def monotone(curve: Curve) -> Curve:
    """The non-decreasing curve nearest to the measured one in least squares (isotonic regression).

    A running maximum would carry a single slow measurement to all larger counts; this averages it away.
    """
    _require_grid(curve)
    means: list[float] = []
    lengths: list[int] = []
    for value in curve.seconds:
        means.append(value)
        lengths.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            last, length = means.pop(), lengths.pop()
            means[-1] = (means[-1] * lengths[-1] + last * length) / (lengths[-1] + length)
            lengths[-1] += length
    seconds = [mean for mean, length in zip(means, lengths, strict=True) for _ in range(length)]
    return Curve(num_tokens=curve.num_tokens, seconds=tuple(seconds))


def scale(curve: Curve, factor: float) -> Curve:
    """The curve with all seconds times ``factor`` (above 0), as on a device that is that much slower."""
    if not factor > 0:
        raise ValueError(f"factor: got {factor}, wanted more than 0, such as 4 for a quarter of the speed")
    return Curve(num_tokens=curve.num_tokens, seconds=tuple(factor * value for value in curve.seconds))


def _require_grid(curve: Curve) -> None:
    if not curve.num_tokens or len(curve.num_tokens) != len(curve.seconds):
        raise ValueError(
            f"curve: got {len(curve.num_tokens)} token counts and {len(curve.seconds)} seconds, "
            "wanted as many of one as of the other, at least one; measure the profile again"
        )
