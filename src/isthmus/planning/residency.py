"""Static planning: which plans' weights every device keeps, so that the best ones for what may come are there.

A link may get slower and requests longer or shorter while devices run. All the weights that some plan needs are kept
only where memory allows; else those plans are kept together that lose least over the situations that are expected
(DeTransformer, Wei et al., DATE 2024, section IV: placement is static, the plan of a request is not). Whatever request
some plan fits, one of them fits beside the weights of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from isthmus.planning.inference import Weighed, costs_of, forecast, pick, weigh_slowed
from isthmus.planning.pieces import Piece, pieces_of
from isthmus.planning.plans import Question
from isthmus.spec.cluster import ClusterProfile
from isthmus.spec.inference import InferencePlan, InferenceRequest

TOKENS = (1, 16, 128, 512)
SLOWDOWNS = (1.0, 4.0, 16.0)
"""Of all links at once."""
_MISSING = 1e3
"""Lost where nothing that is kept fits: more than anything else could be."""
_PRICE = math.log(1.005)
"""Of every plan but the first, as if it lost that much: to read its weights takes time, and memory that others want."""
_FAVOUR = math.log(1.01)
"""What others may lose for keeping the best plan of what was asked for."""
_EXACT_UP_TO = 4
"""Of so many devices every plan that is worth keeping in some situation is weighed in all."""
_MOST_OF_MANY = 8
"""Plans of each situation that are worth a look where there are more devices."""
_MOST_NODES = 5_000
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


def requests(question: Question) -> list[InferenceRequest]:
    """What may come: that of ``question`` first, then others that differ in the number of tokens. Each of them on links
    as they were measured, and on slower ones, is a situation."""
    most, asked = question.spec.max_num_tokens, question.request
    found = [asked]
    for num_tokens in TOKENS:
        new_tokens = min(asked.num_new_tokens, most - min(num_tokens, most))
        if num_tokens <= most and new_tokens == asked.num_new_tokens:
            found.append(replace(asked, num_tokens=num_tokens))
    return list(dict.fromkeys(found))


def plans_to_keep(question: Question) -> Residency:
    """The plans that lose least over all situations, of those that leave no situation without a plan although one would
    fit: weights are there together, each piece once, and beside them what a request takes. Exact for few devices,
    unless the search is cut short. The first is the best of them for ``question``; what ``choose`` takes is among them
    unless that costs the others more than 1 %.

    Raises ``IsthmusError`` where nothing fits ``question``.
    """
    asked = [replace(question, request=request) for request in requests(question)]
    weighed = [weigh_slowed(each, SLOWDOWNS) for each in asked]
    choice, reason = pick(question, weighed[0][0])
    fitting = [[each for each in own if each.fits] for by_links in weighed for own in by_links]
    num_devices = len(question.profile.devices)
    found = [_worth_keeping(own, num_devices) for own in fitting]
    if num_devices > _EXACT_UP_TO:
        found = [_spread(own, _MOST_OF_MANY) for own in found]
    pool = list(dict.fromkeys([choice.plan, *(each.plan for own in found for each in own)]))
    offers = _offers(pool, [_in_all(each, own, pool) for each, own in zip(asked, weighed, strict=True)])
    losses = np.array([offer.losses for offer in offers])
    losses = losses[:, losses.min(axis=0) < _MISSING]
    is_chosen = np.array([offer.plan == choice.plan and offer.losses[0] < _MISSING for offer in offers])
    favour = np.where(is_chosen, 0.0, _FAVOUR * losses.shape[1])
    best = _Search(question, offers, np.column_stack((losses, favour))).run()
    best.sort(key=lambda number: losses[number, 0])
    first = offers[best[0]].plan
    if first != choice.plan:
        reason = f"the fastest of those kept; one of {choice.latency_s:.2g} s would leave others too little memory"
    return Residency(
        plans=tuple(dict.fromkeys(offers[number].plan for number in best)),
        loss=float(np.exp(losses[best].min(axis=0).mean())),
        reason=reason,
    )


def _worth_keeping(weighed: Sequence[Weighed], num_devices: int) -> list[Weighed]:
    """Those to which no other is both as fast and as small on every device, fastest first."""
    fastest = sorted(weighed, key=lambda each: each.latency_s)
    needs = np.full((len(fastest), num_devices), -1)  # devices that have no part need less than nothing
    for own, each in zip(needs, fastest, strict=True):
        own[list(each.plan.devices)] = each.memory_bytes
    kept: list[int] = []
    for number, own in enumerate(needs):
        if not (needs[kept] <= own).all(axis=1).any():
            kept.append(number)
    return [fastest[number] for number in kept]


def _spread(weighed: list[Weighed], most: int) -> list[Weighed]:
    """Up to ``most`` of them, evenly from the fastest to the smallest."""
    last = len(weighed) - 1
    numbers = range(last + 1) if last < most else (round(place * last / (most - 1)) for place in range(most))
    return [weighed[number] for number in numbers]


def _in_all(
    asked: Question, weighed: Sequence[Sequence[Weighed]], pool: Sequence[InferencePlan]
) -> list[list[Weighed]]:
    """For one request, by plan of ``pool`` and slowdown; some were ``weighed`` already."""
    costs = {dtype: costs_of(asked, dtype) for dtype in {plan.dtype for plan in pool}}
    known = {each[0].plan: list(each) for each in zip(*weighed, strict=True)}
    return [known.get(plan) or forecast(asked, plan, SLOWDOWNS, costs[plan.dtype]) for plan in pool]


@dataclass(frozen=True, kw_only=True)
class _Offer:
    """A plan that is kept together with room for requests up to some size."""

    plan: InferencePlan
    room_bytes: tuple[int, ...]
    """Beside weights, by device of the plan."""
    losses: tuple[float, ...]
    """By situation, beside the fastest that fits there."""


def _offers(pool: Sequence[InferencePlan], weighed: Sequence[Sequence[Sequence[Weighed]]]) -> list[_Offer]:
    """Of each plan of ``pool``, for each size of requests that it fits. ``weighed``: by request, plan and slowdown."""
    fastest_s = [
        min((own[number].price_s for own in by_plan if own[number].fits), default=math.inf)
        for by_plan in weighed
        for number in range(len(SLOWDOWNS))
    ]
    offers = []
    for place, plan in enumerate(pool):
        own = [by_plan[place] for by_plan in weighed]
        rooms = dict.fromkeys(slower[0].beside_bytes for slower in own if slower[0].fits)
        for room in rooms:
            seconds = [
                each.price_s if each.fits and _is_within(each.beside_bytes, room) else math.inf
                for slower in own
                for each in slower
            ]
            losses = tuple(
                math.log(own_s / best_s) if own_s < math.inf else _MISSING
                for own_s, best_s in zip(seconds, fastest_s, strict=True)
            )
            offers.append(_Offer(plan=plan, room_bytes=room, losses=losses))
    return offers


def _is_within(needs: Sequence[int], room: Sequence[int]) -> bool:
    return all(need <= limit for need, limit in zip(needs, room, strict=True))


@dataclass(frozen=True)
class _Held:
    """What one device has of the plans kept so far: numbers of pieces, their bytes, and room for requests."""

    pieces: frozenset[int] = frozenset()
    num_bytes: int = 0
    room_bytes: int = 0


class _Search:
    """Which offers to take, depth first, those that gain most first.

    What an offer gains is never more the more others are taken, so one that gains less than its price is left out from
    there on, and what does not fit never fits again.
    """

    def __init__(self, question: Question, offers: Sequence[_Offer], losses: NDArray[np.float64]) -> None:
        """``losses``: by offer and situation."""
        self._offers, self._losses = offers, losses
        ranks = range(len(question.profile.devices))
        self._budgets = [question.budget_bytes(rank) for rank in ranks]
        self._num_situations = losses.shape[1] - 1
        numbers: dict[Piece, int] = {}
        self._pieces: dict[InferencePlan, list[frozenset[int]]] = {}
        for plan in dict.fromkeys(offer.plan for offer in offers):
            own = pieces_of(plan, question.spec)
            self._pieces[plan] = [frozenset(numbers.setdefault(each, len(numbers)) for each in part) for part in own]
        self._piece_bytes = [piece.num_bytes(question.spec) for piece in numbers]
        self._best: tuple[float, list[int]] = (math.inf, [])
        self._num_nodes = 0

    def run(self) -> list[int]:
        """Numbers of offers."""
        nothing = np.full(self._losses.shape[1], 2 * _MISSING)
        self._extend([], nothing, [_Held() for _ in self._budgets], np.arange(len(self._offers)))
        return self._best[1]

    def _extend(
        self, taken: list[int], losses: NDArray[np.float64], held: list[_Held], others: NDArray[np.intp]
    ) -> None:
        self._num_nodes += 1
        cost = self._mean(losses) + (len(taken) - 1) * _PRICE
        if cost < self._best[0]:
            self._best = cost, taken
        gains = np.maximum(losses - self._losses[others], 0.0).sum(axis=1) / self._num_situations
        order = np.argsort(-gains, kind="stable")
        others = others[order][gains[order] > _PRICE]
        if not len(others) or self._num_nodes > _MOST_NODES:
            return
        least = np.minimum(losses, np.minimum.accumulate(self._losses[others][::-1])[::-1])
        for place, number in enumerate(others):
            if self._mean(least[place]) + len(taken) * _PRICE >= self._best[0]:
                return
            joined = self._joined(held, self._offers[number])
            if joined is not None:
                better = np.minimum(losses, self._losses[number])
                self._extend([*taken, int(number)], better, joined, others[place + 1 :])

    def _joined(self, held: list[_Held], offer: _Offer) -> list[_Held] | None:
        """What devices have with ``offer``; None where it does not fit."""
        joined = list(held)
        parts = zip(offer.plan.devices, self._pieces[offer.plan], offer.room_bytes, strict=True)
        for rank, pieces, room_bytes in parts:
            before = held[rank]
            num_bytes = before.num_bytes + sum(self._piece_bytes[number] for number in pieces - before.pieces)
            room_bytes = max(before.room_bytes, room_bytes)
            if num_bytes + room_bytes > self._budgets[rank]:
                return None
            joined[rank] = _Held(before.pieces | pieces, num_bytes, room_bytes)
        return joined

    def _mean(self, losses: NDArray[np.float64]) -> float:
        return float(losses.sum()) / self._num_situations
