"""Static planning: which plans' weights every device keeps, so that the best ones for what may come are there.

A link may get slower and requests longer or shorter while devices run. All the weights that some plan needs are kept
only where memory allows; else those plans are kept together that lose least over the situations that are expected
(DeTransformer, Wei et al., DATE 2024, section IV: placement is static, the plan of a request is not).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from isthmus.planning.inference import Candidate, choose, costs_of, predict, weigh
from isthmus.planning.pieces import Piece, held_bytes, pieces_of
from isthmus.planning.plans import Question
from isthmus.spec.cluster import ClusterProfile
from isthmus.spec.inference import InferencePlan

TOKENS = (1, 16, 128, 512)
_MISSING = math.log(1000.0)
"""Lost where nothing that is kept fits the memory that a situation takes beside weights."""
_PRICE = math.log(1.005)
"""Of every plan but the first, as if it lost that much: to read its weights takes time, and memory that others want."""
SLOWDOWNS = (1.0, 4.0, 16.0)
"""Of all links at once."""
_EXACT_UP_TO = 4
"""Of so many devices every plan that is worth keeping in some situation is weighed in all."""
_MOST_OF_MANY = 8
"""Plans of each situation that are worth a look where there are more devices."""
_MOST_NODES = 20_000
"""Of the search for the plans to keep; beyond it the best found so far is taken."""


@dataclass(frozen=True, kw_only=True)
class Residency:
    """``plans`` to keep, and what they lose: the mean over situations of how much longer the best of them takes than
    the best there is, as a factor (1: nothing)."""

    plans: tuple[InferencePlan, ...]
    loss: float
    reason: str
    """For the first one, in one sentence."""


def slowed(profile: ClusterProfile, factors: Sequence[float]) -> ClusterProfile:
    """``profile`` with links that take that many times as long for every byte."""
    links = tuple(
        link
        if factor == 1.0
        else replace(
            link,
            bytes_per_s=link.bytes_per_s / factor,
            airtime_s_per_byte=link.airtime_s_per_byte * factor,
            transfer=replace(link.transfer, seconds=tuple(seconds * factor for seconds in link.transfer.seconds)),
        )
        for link, factor in zip(profile.links, factors, strict=True)
    )
    return replace(profile, links=links)


def situations(question: Question) -> list[Question]:
    """What may come: ``question`` itself first, then other numbers of tokens, and slower links."""
    most, asked = question.spec.max_num_tokens, question.request
    requests = [asked]
    for num_tokens in TOKENS:
        new_tokens = min(asked.num_new_tokens, most - min(num_tokens, most))
        if num_tokens <= most and new_tokens == asked.num_new_tokens:
            requests.append(replace(asked, num_tokens=num_tokens))
    return [
        replace(question, request=request, profile=slowed(question.profile, [factor] * len(question.profile.links)))
        for factor in SLOWDOWNS
        for request in dict.fromkeys(requests)
    ]


def plans_to_keep(question: Question) -> Residency:
    """The plans whose weights, together and each piece counted once, fit every device and that lose least over
    ``situations``: exact for few devices, unless the search is cut short. What ``choose`` takes for ``question`` is the
    first.

    Raises ``IsthmusError`` where nothing fits.
    """
    choice = choose(question)
    chosen = choice.chosen
    asked = situations(question)
    found = [_worth_keeping([each for each in weigh(situation) if each.fits]) for situation in asked]
    if len(question.profile.devices) > _EXACT_UP_TO:
        found = [_spread(candidates, _MOST_OF_MANY) for candidates in found]
    pool = list(dict.fromkeys([chosen.plan, *(candidate.plan for candidates in found for candidate in candidates)]))
    loss, plans = _Search(question, asked, pool).run()
    return Residency(plans=plans, loss=loss, reason=choice.reason)


def _worth_keeping(candidates: list[Candidate]) -> list[Candidate]:
    """Those to which no other is both as fast and as small on every device."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda each: each.latency_s):
        if not any(_needs_less(other, candidate) for other in kept):
            kept.append(candidate)
    return kept


def _spread(candidates: list[Candidate], most: int) -> list[Candidate]:
    """Up to ``most`` of them, evenly from the fastest to the smallest."""
    last = len(candidates) - 1
    numbers = range(last + 1) if last < most else (round(place * last / (most - 1)) for place in range(most))
    return [candidates[number] for number in numbers]


def _needs_less(one: Candidate, other: Candidate) -> bool:
    memory = dict(zip(other.plan.devices, other.memory_bytes, strict=True))
    return all(need <= memory.get(device, -1) for device, need in zip(one.plan.devices, one.memory_bytes, strict=True))


class _Search:
    """Which of ``pool`` to keep; the first one always is. Depth first, those that gain most alone first."""

    def __init__(self, question: Question, asked: Sequence[Question], pool: Sequence[InferencePlan]) -> None:
        self._spec = question.spec
        ranks = range(len(question.profile.devices))
        self._budgets = [question.budget_bytes(rank) for rank in ranks]
        losses: dict[InferencePlan, list[float]] = {plan: [] for plan in pool}
        self._rest = {plan: [0 for _ in ranks] for plan in pool}
        """Bytes beside weights, by device."""
        self._pieces: dict[InferencePlan, list[tuple[Piece, ...]]] = {}
        for plan in pool:
            own = dict(zip(plan.devices, pieces_of(plan, question.spec), strict=True))
            self._pieces[plan] = [own.get(rank, ()) for rank in ranks]
        for situation in asked:
            costs = {dtype: costs_of(situation, dtype) for dtype in {plan.dtype for plan in pool}}
            weighed = {plan: predict(situation, plan, costs[plan.dtype]) for plan in pool}
            fastest_s = min((each.latency_s for each in weighed.values() if each.fits), default=math.inf)
            for plan, each in weighed.items():
                losses[plan].append(math.log(each.latency_s / fastest_s) if each.fits else _MISSING)
                if each.fits:
                    self._note_rest(plan, each)
        first, *others = pool
        self._losses = losses
        self._pool = [first, *sorted(others, key=lambda plan: self._mean(losses[plan]))]
        self._best: tuple[float, tuple[InferencePlan, ...]] = (math.inf, (first,))
        self._num_nodes = 0

    def run(self) -> tuple[float, tuple[InferencePlan, ...]]:
        """What is lost, and the plans."""
        first = self._pool[0]
        self._extend((first,), self._pieces[first], self._rest[first], self._losses[first], 1)
        plans = self._best[1]
        columns = zip(*(self._losses[plan] for plan in plans), strict=True)
        return math.exp(self._mean([min(column) for column in columns])), plans

    def _extend(
        self,
        kept: tuple[InferencePlan, ...],
        pieces: Sequence[tuple[Piece, ...]],
        rest: Sequence[int],
        losses: Sequence[float],
        number: int,
    ) -> None:
        self._num_nodes += 1
        cost = self._mean(losses) + (len(kept) - 1) * _PRICE
        if cost < self._best[0]:
            self._best = cost, kept
        if number == len(self._pool) or self._num_nodes > _MOST_NODES:
            return
        most = [
            min(column) for column in zip(losses, *(self._losses[each] for each in self._pool[number:]), strict=True)
        ]
        if self._mean(most) + len(kept) * _PRICE >= self._best[0]:
            return
        plan = self._pool[number]
        better = [min(pair) for pair in zip(losses, self._losses[plan], strict=True)]
        if better != list(losses):
            joined = [tuple(dict.fromkeys((*ours, *new))) for ours, new in zip(pieces, self._pieces[plan], strict=True)]
            more = [max(pair) for pair in zip(rest, self._rest[plan], strict=True)]
            if self._fits(joined, more):
                self._extend((*kept, plan), joined, more, better, number + 1)
        self._extend(kept, pieces, rest, losses, number + 1)

    def _fits(self, pieces: Sequence[tuple[Piece, ...]], rest: Sequence[int]) -> bool:
        return all(
            held_bytes(self._spec, own) + more <= budget
            for own, more, budget in zip(pieces, rest, self._budgets, strict=True)
        )

    def _mean(self, losses: Sequence[float]) -> float:
        return sum(losses) / len(losses)

    def _note_rest(self, plan: InferencePlan, candidate: Candidate) -> None:
        for device, need in zip(plan.devices, candidate.memory_bytes, strict=True):
            beside = need - held_bytes(self._spec, self._pieces[plan][device])
            self._rest[plan][device] = max(self._rest[plan][device], beside)
