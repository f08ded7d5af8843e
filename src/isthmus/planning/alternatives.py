"""Plans that are kept beside those that are best by prediction, since they may turn out to be faster.

Plans that are worth choosing among differ by less than predictions are off, and answers tell (``experience``). What a
plan is worth is so its expected improvement over the best that is kept: of the difference of two errors, that part by
which it is faster. Whatever runs from weights that are there anyway costs next to nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from isthmus.planning.experience import ERROR
from isthmus.planning.inference import Weighed
from isthmus.spec.inference import InferencePlan

_FARTHEST = 0.3
"""Slower than the best by more than this factor's logarithm: not looked at."""


def expected_improvement(loss: float) -> float:
    """Of log(seconds), by a plan that is predicted to be slower by ``loss`` than another: E[max(0, error - loss)] for
    the normal difference of both plans' errors."""
    deviation = ERROR * math.sqrt(2)
    ratio = loss / deviation
    density = math.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    return deviation * (density - ratio * math.erfc(ratio / math.sqrt(2)) / 2)


def alternatives(
    kept: Sequence[InferencePlan],
    situations: Sequence[tuple[float, Sequence[Weighed]]],
    fits: Callable[[Sequence[InferencePlan]], bool],
    *,
    most: int,
    least_gain: float,
) -> list[InferencePlan]:
    """Up to ``most`` plans to keep beside ``kept``, those first that are worth most, each by ``least_gain`` or more on
    the mean over ``situations``: the seconds of the best that is kept, and all plans that fit there alone. None that
    differs from another in how its work is divided alone: predictions err alike for both. ``fits``: whether these can
    be kept together."""
    gains = defaultdict[InferencePlan, float](float)
    for best_s, weighed in situations:
        for each in weighed:
            loss = math.log(each.price_s / best_s)
            if loss < _FARTHEST:
                gains[each.plan] += expected_improvement(loss) / len(situations)
    found, kinds = list[InferencePlan](), {_kind(plan) for plan in kept}
    for plan in sorted(gains, key=lambda plan: -gains[plan]):
        if len(found) == most or gains[plan] < least_gain:
            break
        if _kind(plan) not in kinds and fits([*kept, *found, plan]):
            found.append(plan)
            kinds.add(_kind(plan))
    return found


def _kind(plan: InferencePlan) -> Hashable:
    return plan.strategy, len(plan.devices), plan.originals, plan.overlaps, plan.codec, plan.codecs, plan.dtype
