"""Which of the plans whose weights are there answers the next request: by its size, by what links let through last, and
by what answers took.

Nothing is sent to find out: every exchange of large messages tells how fast each came, every answer how right its
prediction was. What is known fades, or a link or a plan that was slow once would never be tried again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from isthmus.planning.experience import Experience
from isthmus.planning.inference import Costs, Weighed, costs_of, forecast, with_memory_of
from isthmus.planning.pieces import resident_bytes
from isthmus.planning.plans import Question
from isthmus.planning.residency import slowed
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan, InferenceRequest

_HALF_LIFE_S = 30.0
_NOTICED = 1.25
"""A link is slower than when it was measured if it lets through less than that by such a factor."""
_STEPS_PER_DOUBLING = 4
_TELLING = 1.1
"""A slower link tells from an answer's seconds where it makes them longer by such a factor."""
_GIVING_BACK = 1.3
"""Seconds of a request while freed memory is given back at once, by those while it is used again."""
_MOST_WEIGHED = 256
"""Requests on links as slow for which plans stay weighed."""
_CURIOSITY = 1.5
"""By so many deviations a plan that is little known counts as faster than expected. With 1.5, 30 requests are answered
faster than without ever trying, and any first few of them as fast (simulated: predictions that scatter by 12 %)."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the plan of that ``number`` took for a request."""

    request: InferenceRequest
    number: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Option:
    """A plan for some request. ``missing_bytes``: on the device that lacks most; 0 or less where it fits."""

    weighed: Weighed
    missing_bytes: int
    gives_back: bool

    @property
    def latency_s(self) -> float:
        return self.weighed.latency_s * (_GIVING_BACK if self.gives_back else 1.0)

    @property
    def price_s(self) -> float:
        return self.weighed.price_s * (_GIVING_BACK if self.gives_back else 1.0)


class RuntimePlanner:
    """The leader's. ``question`` is what was planned for, with the profile of devices and links; ``plans`` are those
    that are there."""

    def __init__(
        self, question: Question, plans: Sequence[InferencePlan], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._question, self._plans, self._clock = question, tuple(plans), clock
        num_devices = len(question.profile.devices)
        self._resident_bytes = resident_bytes(plans, question.spec, num_devices, is_frugal=question.is_frugal)
        """Of all the plans' weights, by device."""
        self._slowdowns = [1.0] * len(question.profile.links)
        """Of each device's link, when it was seen last."""
        self._seen_s = [clock()] * len(self._slowdowns)
        self._weigh = lru_cache(maxsize=_MOST_WEIGHED)(self._options_on)
        self._experience = Experience()

    def observe(self, rates_NN: Sequence[Sequence[float]], answer: Answer | None = None) -> None:
        """Bytes a second that each device (row) got from each (column) in the last request; 0: not known. And how long
        its answer took.

        Several messages share a link while devices exchange with all others at once, so a link lets through what its
        fastest message got, times the number of others. A device that computes meanwhile, or is interrupted, reads late
        what is there: so links are slower only if the answer took accordingly long.
        """
        before, kept = self.slowdowns(), list(zip(self._slowdowns, self._seen_s, strict=True))
        self._see(rates_NN)
        if answer is None:
            return
        if self._refutes(answer, before, self.slowdowns()):
            for device, (factor, seen_s) in enumerate(kept):
                if self._slowdowns[device] > factor:
                    self._slowdowns[device], self._seen_s[device] = factor, seen_s
        predicted_s = self._options(answer.request)[answer.number].latency_s
        kind, now_s = _kind(answer.request), self._clock()
        self._experience.note(kind, answer.number, predicted_s=predicted_s, measured_s=answer.seconds, now_s=now_s)

    def _see(self, rates_NN: Sequence[Sequence[float]]) -> None:
        links = self._question.profile.links
        known = [
            [max(rates_NN[device][peer], rates_NN[peer][device]) for peer in range(len(links))]
            for device in range(len(links))
        ]
        num_others = max(0, sum(any(row) for row in known) - 1)
        for device, row in enumerate(known):
            if any(row):
                factor = links[device].bytes_per_s / (num_others * max(row))
                self._slowdowns[device] = factor if factor > _NOTICED else 1.0
                self._seen_s[device] = self._clock()

    def _refutes(self, answer: Answer, before: tuple[float, ...], after: tuple[float, ...]) -> bool:
        """Whether what the answer took is nearer to what links as they were ``before`` let expect than to what those as
        seen ``after`` do, which would have made a difference."""
        kind, number = _kind(answer.request), answer.number
        [expected] = self._experience.expected(kind, (number,), self._clock())
        before_s, after_s = (
            self._options(answer.request, factors)[number].latency_s * math.exp(expected.mean)
            for factors in (before, after)
        )
        return after_s > _TELLING * before_s and answer.seconds < math.sqrt(before_s * after_s)

    def slowdowns(self) -> tuple[float, ...]:
        """By how much each link is slower than when it was measured, as far as is known now."""
        now_s, factors = self._clock(), []
        for factor, seen_s in zip(self._slowdowns, self._seen_s, strict=True):
            steps = math.log2(factor) * 0.5 ** ((now_s - seen_s) / _HALF_LIFE_S) * _STEPS_PER_DOUBLING
            factors.append(2.0 ** (round(steps) / _STEPS_PER_DOUBLING))
        return tuple(factors)

    def choose(self, request: InferenceRequest, *, may_try: bool = True) -> int:
        """The number of the plan that is expected to be fastest, of those that fit beside the weights that are there
        (one device where several gain less than 3 %). ``may_try``: what may well be faster, for all that is known,
        counts as faster, so that it becomes known. Raises ``IsthmusError`` that names the least memory with which one
        would fit."""
        options = self._options(request)
        fitting = [number for number, each in enumerate(options) if each.missing_bytes <= 0]
        if not fitting:
            raise self._too_little_memory(request, [each.weighed for each in options])
        prices_s = {}
        expectations = self._experience.expected(_kind(request), fitting, self._clock())
        for number, expected in zip(fitting, expectations, strict=True):
            error = expected.mean - (_CURIOSITY * expected.deviation if may_try else 0.0)
            prices_s[number] = options[number].price_s * math.exp(error)
        return min(fitting, key=lambda number: prices_s[number])

    def gives_back(self, request: InferenceRequest, number: int) -> bool:
        """Whether plan ``number`` fits only if devices give memory back as soon as it is free."""
        return self._options(request)[number].gives_back

    def _options(self, request: InferenceRequest, factors: tuple[float, ...] | None = None) -> list[_Option]:
        """All plans, by their numbers, on links that are slower by ``factors``; None: as they are now."""
        return self._weigh(request, self.slowdowns() if factors is None else factors)

    def _options_on(self, request: InferenceRequest, factors: tuple[float, ...]) -> list[_Option]:
        question = replace(self._question, request=request, profile=slowed(self._question.profile, factors))
        costs = {dtype: costs_of(question, dtype) for dtype in {plan.dtype for plan in self._plans}}
        return [self._option(question, plan, costs[plan.dtype]) for plan in self._plans]

    def _option(self, question: Question, plan: InferencePlan, costs: Costs) -> _Option:
        found = forecast(question, plan, costs=costs)
        [weighed] = found
        missing_bytes, gives_back = self._missing_bytes(weighed), False
        if question.is_frugal:
            [[reusing]] = with_memory_of(replace(question, is_frugal=False), [found])
            gives_back = self._missing_bytes(reusing) > 0
        return _Option(weighed=weighed, missing_bytes=missing_bytes, gives_back=gives_back)

    def _missing_bytes(self, weighed: Weighed) -> int:
        """On the device that lacks most; 0 or less where it fits."""
        return max(
            self._resident_bytes[rank] + beside - budget
            for rank, beside, budget in zip(
                weighed.plan.devices, weighed.beside_bytes, weighed.budget_bytes, strict=True
            )
        )

    def _too_little_memory(self, request: InferenceRequest, weighed: Sequence[Weighed]) -> IsthmusError:
        least = min(weighed, key=self._missing_bytes)
        plan = least.plan
        needs = zip(plan.devices, least.beside_bytes, least.budget_bytes, strict=True)
        rank, beside, budget = max(needs, key=lambda each: self._resident_bytes[each[0]] + each[1] - each[2])
        asked = f"{request.batch} × {request.num_tokens}"
        if request.num_new_tokens:
            asked += f" and {request.num_new_tokens} new"
        return IsthmusError(
            f"memory: no plan that is loaded fits a request of {asked} tokens; {plan.strategy} on {len(plan.devices)} "
            f"devices lacks least, {self._missing_bytes(least) / 2**20:.1f} MiB on rank {rank} (weights take "
            f"{self._resident_bytes[rank] / 2**20:.1f} MiB, the request {beside / 2**20:.1f}, and there are "
            f"{budget / 2**20:.1f}): ask for fewer or shorter texts at a time, or give more memory"
        )


def _kind(request: InferenceRequest) -> tuple[int, int, bool]:
    """Requests that are alike: as long but for a factor of about 1.4, as many, and with or without new tokens."""
    return round(math.log2(request.num_tokens)), round(math.log2(request.batch)), request.num_new_tokens > 0
