"""Static planning: which plans' weights every device keeps, so that the best ones for what may come are there.

A link may get slower and requests longer or shorter while devices run. All the weights that some plan needs are kept
only where memory allows; else those plans are kept together that lose least over the situations that are expected
(DeTransformer, Wei et al., DATE 2024, section IV: placement is static, the plan of a request is not). Whatever request
some plan fits, one of them fits beside the weights of all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from isthmus.planning.alternatives import alternatives
from isthmus.planning.inference import Weighed, costs_of, forecast, pick, weigh_slowed, with_memory_of
from isthmus.planning.pieces import Piece, cut, pieces_of, pieces_on, resident_bytes
from isthmus.planning.plans import Question
from isthmus.spec.cluster import ClusterProfile
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan, InferenceRequest

TOKENS = (1, 16, 128, 512)
SLOWDOWNS = (1.0, 4.0, 16.0)
"""Of all links at once."""
_MISSING = 1e3
"""Lost where nothing that is kept fits: more than anything else could be."""
_PRICE = math.log(1.001)
"""Of every plan but the first, as if it lost that much: to read its weights takes time, and memory that others want."""
_FRUGALITY = math.log(1.05)
"""What being frugal with memory must gain, since requests take longer: measured, 1 % with 128 tokens and 15 % with 512
for giving it back, and some of the time of layers that are in parts."""
_FAVOUR = math.log(1.01)
"""What others may lose for keeping the best plan of what was asked for."""
_EXACT_UP_TO = 4
"""Of so many devices every plan that is worth keeping in some situation is weighed in all."""
_MOST_OF_MANY = 8
"""Plans of each situation that are worth a look where there are more devices."""
_MOST_ALTERNATIVES = 8
"""Beside the plans to keep."""
_MOST_NODES = 5_000
"""Of the search for the plans to keep; beyond it the best found so far is taken."""


@dataclass(frozen=True, kw_only=True)
class Residency:
    """What to keep: the ``plans`` that are best by prediction, and others beside them that may turn out to be (see
    ``alternatives``)."""

    plans: tuple[InferencePlan, ...]
    alternatives: tuple[InferencePlan, ...] = ()
    loss: float
    """The mean over situations of how much longer the best of ``plans`` takes than the best there is, as a factor (1:
    nothing)."""
    reason: str
    """For the first one, in one sentence."""
    is_frugal: bool = False
    """Whether devices are to be frugal with memory (``Question.is_frugal``): all that is kept is chosen for that."""

    @property
    def all_plans(self) -> tuple[InferencePlan, ...]:
        return self.plans + self.alternatives


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
    fit: weights are there together, each piece once, and beside them what a request takes. Exact for few
    devices, unless the search is cut short. The first is the best of them for ``question``; what ``choose`` takes is
    among them unless that costs the others more than 1 %. Where memory is short, devices may have to be frugal
    with it: if more kinds of requests fit then, or all are faster by 5 % on the mean.

    Raises ``IsthmusError`` where nothing fits ``question``.
    """
    weighed = [weigh_slowed(replace(question, request=each), SLOWDOWNS) for each in requests(question)]
    try:
        found = _kept(question, weighed)
    except IsthmusError:
        if question.is_frugal:
            raise
        return _kept_frugally(question, weighed).residency
    if found.is_free or question.is_frugal:
        return found.residency
    frugal = _kept_frugally(question, weighed)
    gain = found.mean_log_s - frugal.mean_log_s
    is_better = frugal.num_situations > found.num_situations or gain > _FRUGALITY
    return (frugal if is_better else found).residency


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What is kept by devices that are frugal, or by others, and how well that is."""

    residency: Residency
    num_situations: int
    """In which some plan fits."""
    mean_log_s: float
    """Of the fastest that is kept, over these."""
    is_free: bool
    """Whether memory excludes no plan in any situation, and what is kept loses next to nothing."""


def _kept_frugally(question: Question, weighed: Sequence[Sequence[Sequence[Weighed]]]) -> _Kept:
    """What is kept if devices are frugal; ``weighed`` for others. Parts of a plain model depend on memory."""
    asked = [replace(question, request=each, is_frugal=True) for each in requests(question)]
    if question.spec.decoupling is None:
        weighed = [weigh_slowed(each, SLOWDOWNS) for each in asked]
    else:
        weighed = [with_memory_of(each, own) for each, own in zip(asked, weighed, strict=True)]
    return _kept(replace(question, is_frugal=True), weighed)


def _kept(question: Question, weighed: Sequence[Sequence[Sequence[Weighed]]]) -> _Kept:
    """As ``plans_to_keep``, on devices that are as frugal as ``question`` says. ``weighed``: plans by request and
    slowdown of links."""
    asked = [replace(question, request=request) for request in requests(question)]
    choice, reason = pick(question, weighed[0][0])
    fitting = [[each for each in own if each.fits] for by_links in weighed for own in by_links]
    num_devices = len(question.profile.devices)
    found = [_worth_keeping(own, num_devices) for own in fitting]
    if num_devices > _EXACT_UP_TO:
        found = [_spread(own, _MOST_OF_MANY) for own in found]
    pool = list(dict.fromkeys([choice.plan, *(each.plan for own in found for each in own)]))
    offers, fastest_s = _offers(pool, [_in_all(each, own, pool) for each, own in zip(asked, weighed, strict=True)])
    is_possible = np.isfinite(fastest_s)
    losses = np.array([offer.losses for offer in offers])[:, is_possible]
    best_log_s = np.log(fastest_s[is_possible])
    is_chosen = np.array([offer.plan == choice.plan and offer.losses[0] < _MISSING for offer in offers])
    favour = np.where(is_chosen, 0.0, _FAVOUR * losses.shape[1])
    search = _Search(question, offers, np.column_stack((losses, favour)))
    best = search.run()
    best.sort(key=lambda number: losses[number, 0])
    first = offers[best[0]].plan
    if first != choice.plan:
        reason = f"the fastest of those kept; one of {choice.latency_s:.2g} s would leave others too little memory"
    least = losses[best].min(axis=0)
    mean_loss = float(least.mean())
    plans = tuple(dict.fromkeys(offers[number].plan for number in best))
    situations = zip(np.exp(best_log_s + least), itertools.compress(fitting, is_possible), strict=True)
    residency = Residency(
        plans=plans,
        alternatives=_beside(question, plans, search.room_bytes(best), list(situations)),
        loss=math.exp(mean_loss),
        reason=reason,
        is_frugal=question.is_frugal,
    )
    all_fit = all(each.fits for by_links in weighed for own in by_links for each in own)
    return _Kept(
        residency=residency,
        num_situations=len(best_log_s),
        mean_log_s=mean_loss + float(best_log_s.mean()),
        is_free=all_fit and mean_loss < _FAVOUR,
    )


def _beside(
    question: Question,
    kept: Sequence[InferencePlan],
    room_bytes: Sequence[int],
    situations: Sequence[tuple[float, Sequence[Weighed]]],
) -> tuple[InferencePlan, ...]:
    """What else to keep; ``room_bytes`` stay free for requests, by rank. Frugal devices keep nothing more for it: with
    weights in more parts all requests take longer, or freed memory must be given back at once."""
    spec, ranks = question.spec, range(len(question.profile.devices))
    held = [pieces_on(rank, kept, spec) for rank in ranks]

    def fits(plans: Sequence[InferencePlan]) -> bool:
        *_, last = plans
        if all(held[rank].issuperset(own) for rank, own in zip(last.devices, pieces_of(last, spec), strict=True)):
            return True
        if question.is_frugal:
            return False
        resident = resident_bytes(plans, spec, len(ranks))
        return all(resident[rank] + room_bytes[rank] <= question.budget_bytes(rank) for rank in ranks)

    return tuple(alternatives(kept, situations, fits, most=_MOST_ALTERNATIVES, least_gain=_PRICE))


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


def _offers(
    pool: Sequence[InferencePlan], weighed: Sequence[Sequence[Sequence[Weighed]]]
) -> tuple[list[_Offer], NDArray[np.float64]]:
    """Of each plan of ``pool``, for each size of requests that it fits; and the seconds of the fastest by situation,
    infinite where none fits. ``weighed``: by request, plan and slowdown."""
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
    return offers, np.array(fastest_s)


def _is_within(needs: Sequence[int], room: Sequence[int]) -> bool:
    return all(need <= limit for need, limit in zip(needs, room, strict=True))


@dataclass(frozen=True)
class _Held:
    """What devices have of the plans kept so far: which parts, and room for requests, by device."""

    parts: NDArray[np.bool_]
    room_bytes: NDArray[np.int64]


class _Search:
    """Which offers to take, depth first, those that gain most first.

    What an offer gains is never more the more others are taken, so one that gains less than its price is left out from
    there on, and what does not fit never fits again.
    """

    def __init__(self, question: Question, offers: Sequence[_Offer], losses: NDArray[np.float64]) -> None:
        """``losses``: by offer and situation."""
        self._losses = losses
        num_devices = len(question.profile.devices)
        self._budgets = np.array([question.budget_bytes(rank) for rank in range(num_devices)])
        self._num_situations = losses.shape[1] - 1
        self._parts, self._part_bytes = _parts_of([offer.plan for offer in offers], question)
        self._rooms = np.zeros((len(offers), num_devices), dtype=np.int64)
        for own, offer in zip(self._rooms, offers, strict=True):
            own[list(offer.plan.devices)] = offer.room_bytes
        self._best: tuple[float, list[int]] = (math.inf, [])
        self._num_nodes = 0

    def run(self) -> list[int]:
        """Numbers of offers."""
        nothing = np.full(self._losses.shape[1], 2 * _MISSING)
        held = _Held(np.zeros_like(self._parts[0]), np.zeros_like(self._budgets))
        self._extend([], nothing, held, np.arange(len(self._losses)))
        return self._best[1]

    def room_bytes(self, numbers: Sequence[int]) -> list[int]:
        """What these offers leave room for together, by rank."""
        return self._rooms[numbers].max(axis=0).tolist()

    def _extend(self, taken: list[int], losses: NDArray[np.float64], held: _Held, others: NDArray[np.intp]) -> None:
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
            joined = self._joined(held, number)
            if joined is not None:
                better = np.minimum(losses, self._losses[number])
                self._extend([*taken, int(number)], better, joined, others[place + 1 :])

    def _joined(self, held: _Held, number: np.intp) -> _Held | None:
        """What devices have with this offer; None where it does not fit."""
        joined = _Held(held.parts | self._parts[number], np.maximum(held.room_bytes, self._rooms[number]))
        fits = (joined.parts @ self._part_bytes + joined.room_bytes <= self._budgets).all()
        return joined if fits else None

    def _mean(self, losses: NDArray[np.float64]) -> float:
        return float(losses.sum()) / self._num_situations


def _parts_of(plans: Sequence[InferencePlan], question: Question) -> tuple[list[NDArray[np.bool_]], NDArray[np.int64]]:
    """Which parts every device has under each of ``plans`` (devices × parts), and their bytes. What is there under the
    same plans on the same devices is one part."""
    spec = question.spec
    pieces = {plan: pieces_of(plan, spec) for plan in plans}
    kept = cut(
        spec,
        {piece for by_device in pieces.values() for own in by_device for piece in own},
        is_frugal=question.is_frugal,
    )
    numbers: dict[Piece, int] = {}
    numbered = {piece: [numbers.setdefault(part, len(numbers)) for part in parts] for piece, parts in kept.items()}
    where: list[list[tuple[int, int]]] = [[] for _ in numbers]
    for place, (plan, by_device) in enumerate(pieces.items()):
        for rank, own in zip(plan.devices, by_device, strict=True):
            for number in itertools.chain.from_iterable(numbered[piece] for piece in own):
                where[number].append((place, rank))
    total_bytes: dict[tuple[tuple[int, int], ...], int] = {}
    for part, places in zip(numbers, map(tuple, where), strict=True):
        total_bytes[places] = total_bytes.get(places, 0) + part.num_bytes(spec)
    has = np.zeros((len(pieces), len(question.profile.devices), len(total_bytes)), dtype=bool)
    for number, places in enumerate(total_bytes):
        for place, rank in places:
            has[place, rank, number] = True
    by_plan = dict(zip(pieces, has, strict=True))
    return [by_plan[plan] for plan in plans], np.array(list(total_bytes.values()), dtype=np.int64)
