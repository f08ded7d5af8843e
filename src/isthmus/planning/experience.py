"""What answers took beside what was predicted of them, and so what to expect of a plan's next one.

``log(measured ÷ predicted)`` of an answer is taken for a sum of three: a *drift* that all plans have in common for
requests alike (a machine busier than when it was measured), an *error* of the plan's own prediction, and *scatter*. All
are normal with the deviations below, so what is expected of each plan, and how sure that is, are the posterior's mean
and deviation. A plan that was never tried is expected to drift as the others do.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

DRIFT, ERROR, SCATTER = 0.3, 0.1, 0.1
_FARTHEST = 0.35
"""An answer counts as no farther than this from what was expected: it may have been interrupted."""
_COLD_S = 0.04
"""By about so much the first of requests alike is slower: it meets cold caches and new memory (measured: 25 to 39 ms,
whatever the size; another plan's first one is not)."""
_MOST_ANSWERS = 16.0
_HALF_LIFE_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """Of log(measured ÷ predicted)."""

    mean: float
    deviation: float


@dataclass(kw_only=True)
class _Answers:
    """Of one plan to requests alike. ``count``: of answers as sure as most are."""

    count: float = 0.0
    mean: float = 0.0
    noted_s: float

    def count_at(self, now_s: float) -> float:
        return self.count * 0.5 ** ((now_s - self.noted_s) / _HALF_LIFE_S)


class Experience:
    """Of plans by number. ``kind`` says which requests are alike; one kind tells nothing of another."""

    def __init__(self) -> None:
        self._answers: dict[Hashable, dict[int, _Answers]] = {}

    def note(self, kind: Hashable, plan: int, *, predicted_s: float, measured_s: float, now_s: float) -> None:
        """One answer. ``now_s``: of a clock that never goes back."""
        of_kind = self._answers.setdefault(kind, {})
        cold = 0.0 if of_kind else _COLD_S / measured_s
        weight = SCATTER**2 / (SCATTER**2 + cold**2)
        known = of_kind.setdefault(plan, _Answers(noted_s=now_s))
        [expected] = self.expected(kind, (plan,), now_s)
        found = math.log(measured_s / predicted_s)
        found = min(max(found, expected.mean - _FARTHEST), expected.mean + _FARTHEST)
        known.count = min(known.count_at(now_s) + weight, _MOST_ANSWERS)
        known.mean += (found - known.mean) * weight / known.count
        known.noted_s = now_s

    def expected(self, kind: Hashable, plans: Iterable[int], now_s: float) -> list[Expectation]:
        """Of each of ``plans``."""
        known = {
            plan: (answers.mean, SCATTER**2 / answers.count_at(now_s))
            for plan, answers in self._answers.get(kind, {}).items()
            if answers.count
        }
        weights = {plan: 1 / (ERROR**2 + variance) for plan, (_, variance) in known.items()}
        drift = sum(weights[plan] * mean for plan, (mean, _) in known.items())
        drift /= sum(weights.values()) + 1 / DRIFT**2
        found = []
        for plan in plans:
            mean, variance = known.get(plan, (drift, math.inf))
            trust = ERROR**2 / (ERROR**2 + variance)
            found.append(Expectation(mean=drift + trust * (mean - drift), deviation=ERROR * math.sqrt(1 - trust)))
        return found
