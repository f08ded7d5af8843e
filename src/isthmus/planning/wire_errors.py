"""What codecs cost in exactness: the relative error that is to be expected of what a plan computes.

Every exchange in a lossy codec adds its rounding to each token that passes through it. Roundings are independent, so
their squares add up: the error of a plan is the root of the sum of ``WIRE_ERRORS`` squared over its exchanges. That
takes each exchanged value for the whole hidden state, which keys, values and partial sums are not: what is measured is
less (``bench infer``), the more so where attention averages over it.
"""

from __future__ import annotations

from collections.abc import Iterable

from isthmus.planning.steps import Step

WIRE_ERRORS = {"fp32": 0.0, "bf16": 1.66e-3, "int8": 5.96e-3, "int4": 0.1077}
"""Root mean square of rounding normally distributed values once, relative to theirs. Of blocks of 64 the largest value
is 2.63 standard deviations in the root mean square, and a step that (2 · levels)-th, uniform in error:
2.63 / (levels · √12), with 127 and 7 levels."""
_SLACK = 1e-9
"""Sums of the same squares in another order differ by less."""


def squared_error(steps: Iterable[Step]) -> float:
    """Of what tokens pass through, if it is all of ``steps``; of an exchange in portions it is one of them."""
    exchanges = (step.exchange for step in steps if step.exchange is not None and not step.is_rest)
    return sum(max(WIRE_ERRORS[traffic.codec] for traffic in exchange) ** 2 for exchange in exchanges)


def is_within(squared: float, max_error: float) -> bool:
    """Whether an error of that square is allowed."""
    return squared <= max_error**2 * (1 + _SLACK)
