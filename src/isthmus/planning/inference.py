"""Which devices answer a request, and how: every plan's latency, bytes, exchanges, memory and bound, and the choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from isthmus.planning.block_layout import block_parts
from isthmus.planning.device_costs import (
    PROCESS_BYTES,
    DeviceCosts,
    block_generation_bytes,
    generation_bytes,
    working_bytes,
)
from isthmus.planning.original_ways import original_shares
from isthmus.planning.pieces import weights_bytes
from isthmus.planning.plans import Question, plans
from isthmus.planning.shares import divide_layer
from isthmus.planning.step_seconds import Crew
from isthmus.planning.subsets import subsets
from isthmus.planning.workload import Workload, device_shares, passes
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.spec.transformer import TransformerSpec

Costs = dict[int, DeviceCosts]
"""By rank."""
GAIN = 0.03
"""Several devices must be predicted to be so much faster than one, else one is taken: it depends on nobody."""


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """One plan and what it is predicted to take: all that a choice needs. Tuples are by device, in the plan's order."""

    plan: InferencePlan
    latency_s: float
    first_token_s: float
    """Of ``latency_s``, where tokens are generated; else all of it."""
    weights_bytes: tuple[int, ...]
    memory_bytes: tuple[int, ...]
    """Weights and what computing takes, beside the process itself."""
    budget_bytes: tuple[int, ...]

    @property
    def fits(self) -> bool:
        return all(need <= budget for need, budget in zip(self.memory_bytes, self.budget_bytes, strict=True))

    @property
    def beside_bytes(self) -> tuple[int, ...]:
        """``memory_bytes`` without those of the weights."""
        return tuple(need - own for need, own in zip(self.memory_bytes, self.weights_bytes, strict=True))

    @property
    def price_s(self) -> float:
        """``latency_s`` as a choice counts it: several devices must be faster than one by ``GAIN``."""
        return self.latency_s * (1 - GAIN) if self.plan.strategy == "single" else self.latency_s


@dataclass(frozen=True, kw_only=True)
class Candidate(Weighed):
    """What is told of a plan beside that."""

    compute_s: float
    """Of ``latency_s``; the rest are exchanges, encoding and waiting."""
    bound_s: float
    sent_bytes: tuple[int, ...]
    num_exchanges: int


_AnyWeighed = TypeVar("_AnyWeighed", bound=Weighed)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The plan to take, all that were weighed (fastest first), and why in one sentence."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    reason: str


def choose(question: Question) -> Choice:
    """The fastest plan that fits; one device where several gain less than 3 %. Raises ``IsthmusError`` that names the
    least memory with which one would fit."""
    candidates = sorted(weigh(question), key=lambda candidate: candidate.latency_s)
    chosen, reason = pick(question, candidates)
    return Choice(chosen=chosen, candidates=tuple(candidates), reason=reason)


def pick(question: Question, weighed: Sequence[_AnyWeighed]) -> tuple[_AnyWeighed, str]:
    """The plan to take, as ``choose``, and why."""
    if not weighed:
        raise IsthmusError(
            f"strategies: got {', '.join(question.strategies)} for {len(question.profile.devices)} devices, which "
            "leaves nothing to choose from; name 'single' too, or more devices"
        )
    fitting = [each for each in weighed if each.fits]
    if not fitting:
        raise _too_little_memory(weighed)
    chosen = min(fitting, key=lambda each: each.price_s)
    alone_s = min((each.latency_s for each in fitting if each.plan.strategy == "single"), default=None)
    if alone_s is None:
        reason = "the fastest that fits"
    elif chosen.plan.strategy != "single":
        reason = f"predicted {alone_s / chosen.latency_s:.2f} times as fast as one device"
    elif any(each.latency_s < chosen.latency_s for each in fitting):
        reason = f"several devices would gain less than {GAIN:.0%}"
    else:
        reason = "several devices are predicted to be no faster than one"
    return chosen, reason


def weigh(question: Question) -> Iterator[Candidate]:
    """Every candidate, fitting or not: on every set of a few devices, on sensible ones of many (``subsets``)."""
    for plan, [crew] in _plans_of(question, (1.0,)):
        yield _candidate(question, plan, crew)


def weigh_slowed(question: Question, slowdowns: Sequence[float]) -> list[list[Weighed]]:
    """Every candidate, for each of ``slowdowns`` of all links: the same plans, the fastest for each among them."""
    found: list[list[Weighed]] = [[] for _ in slowdowns]
    for plan, crews in _plans_of(question, slowdowns):
        for own, each in zip(
            found, _weighed(question, plan, crews, passes(plan, question.spec, question.request)), strict=True
        ):
            own.append(each)
    return found


def with_memory_of(question: Question, weighed: Sequence[Sequence[Weighed]]) -> list[list[Weighed]]:
    """The plans that ``weigh_slowed`` found for devices that are more or less frugal, as they need memory on those of
    ``question``. Seconds stay."""
    found: list[list[Weighed]] = [[] for _ in weighed]
    for alike in zip(*weighed, strict=True):
        beside = _beside_bytes(question, alike[0].plan)
        memory = tuple(own + more for own, more in zip(alike[0].weights_bytes, beside, strict=True))
        for own, each in zip(found, alike, strict=True):
            own.append(replace(each, memory_bytes=memory))
    return found


def forecast(
    question: Question, plan: InferencePlan, slowdowns: Sequence[float] = (1.0,), costs: Costs | None = None
) -> list[Weighed]:
    """``predict`` what a choice needs, for each of ``slowdowns`` of all links."""
    crew = _crew_of(question, plan, costs)
    crews = [crew.slowed(slowdown) for slowdown in slowdowns]
    return _weighed(question, plan, crews, passes(plan, question.spec, question.request))


def predict(question: Question, plan: InferencePlan, costs: Costs | None = None) -> Candidate:
    """What ``plan`` is predicted to take. ``costs`` by rank, where there are some already."""
    return _candidate(question, plan, _crew_of(question, plan, costs))


def _plans_of(question: Question, slowdowns: Sequence[float]) -> Iterator[tuple[InferencePlan, list[Crew]]]:
    """Plans, and their devices on links that are slower."""
    for dtype in question.dtypes:
        costs = costs_of(question, dtype)
        sets = dict.fromkeys(ranks for slowdown in slowdowns for ranks in subsets(question, costs, slowdown))
        for ranks in sets:
            crew = Crew.of(costs, ranks, len(question.profile.devices))
            crews = [crew.slowed(slowdown) for slowdown in slowdowns]
            for plan in plans(question, ranks, dtype, costs, crews):
                yield plan, crews


def _crew_of(question: Question, plan: InferencePlan, costs: Costs | None) -> Crew:
    if costs is None:
        costs = costs_of(question, plan.dtype, plan.devices)
    return Crew.of(costs, plan.devices, len(question.profile.devices))


def _weighed(
    question: Question, plan: InferencePlan, crews: Sequence[Crew], all_passes: Sequence[tuple[Workload, int]]
) -> list[Weighed]:
    weights = tuple(weights_bytes(plan, question.spec))
    memory = tuple(own + beside for own, beside in zip(weights, _beside_bytes(question, plan), strict=True))
    budgets, found = tuple(question.budget_bytes(rank) for rank in plan.devices), []
    for crew in crews:
        seconds = [crew.seconds(load, count) for load, count in all_passes]
        found.append(
            Weighed(
                plan=plan,
                latency_s=sum(seconds),
                first_token_s=seconds[0],
                weights_bytes=weights,
                memory_bytes=memory,
                budget_bytes=budgets,
            )
        )
    return found


def _candidate(question: Question, plan: InferencePlan, crew: Crew) -> Candidate:
    all_passes = passes(plan, question.spec, question.request)
    [weighed] = _weighed(question, plan, [crew], all_passes)
    sent = [[count * num_bytes for num_bytes in load.sent_bytes()] for load, count in all_passes]
    return Candidate(
        **{each.name: getattr(weighed, each.name) for each in fields(weighed)},
        compute_s=sum(count * sum(map(crew.computing_s, load.steps)) for load, count in all_passes),
        bound_s=sum(count * crew.seconds(load, step_s=crew.least_step_s) for load, count in all_passes),
        sent_bytes=tuple(map(sum, zip(*sent, strict=True))),
        num_exchanges=sum(count * load.num_exchanges() for load, count in all_passes),
    )


def _beside_bytes(question: Question, plan: InferencePlan) -> list[int]:
    """By device: of all that the request takes beside the weights and the process."""
    spec, request = question.spec, question.request
    shares = device_shares(plan, spec)
    more = [
        working_bytes(
            spec,
            share,
            request,
            len(shares),
            num_sub_blocks=len(part.sub_blocks),
            is_frugal=question.is_frugal,
        )
        for share, part in zip(shares, block_parts(plan, spec), strict=True)
    ]
    if request.num_new_tokens:
        generating = _generating_bytes(spec, plan, request)
        more = [working + own for working, own in zip(more, generating, strict=True)]
    return more


def _generating_bytes(spec: TransformerSpec, plan: InferencePlan, request: InferenceRequest) -> list[int]:
    """Of the cache and the head where tokens are generated."""
    if spec.decoupling is None:
        return [generation_bytes(spec, share, request, plan.dtype) for share in device_shares(plan, spec)]
    found = []
    words = [len(share.vocabulary) for share in divide_layer(spec, plan.weights)]
    for part, shares, num_words in zip(block_parts(plan, spec), original_shares(plan, spec), words, strict=True):
        own = [share for _, share in part.held(spec)]
        found.append(block_generation_bytes(spec, own, shares, num_words, request, plan.dtype))
    return found


# --- what a plan takes ------------------------------------------------------------------------------------------------


def costs_of(question: Question, dtype: str, ranks: Sequence[int] | None = None) -> Costs:
    """By rank (None: all), for ``predict``. They remember what they have evaluated. Raises ``IsthmusError`` where
    ``dtype`` was not measured."""
    profile, found = question.profile, {}
    for rank in range(len(profile.devices)) if ranks is None else ranks:
        device = profile.devices[rank]
        if dtype not in device.layers:
            raise IsthmusError(
                f"dtype: {dtype} was not measured on {device.name}, only {', '.join(device.layers)}; measure it with "
                f"--dtype {dtype} --refresh"
            )
        found[rank] = DeviceCosts(profile=device, link=profile.links[rank], spec=question.spec, dtype=dtype)
    return found


def _too_little_memory(candidates: Sequence[Weighed]) -> IsthmusError:
    least = min(candidates, key=lambda candidate: max(candidate.memory_bytes))
    need, plan = max(least.memory_bytes), least.plan
    room = ", ".join(f"{budget / 2**20:.0f}" for budget in least.budget_bytes)
    return IsthmusError(
        f"memory: no plan fits; the smallest budget that would is {(need + PROCESS_BYTES) / 2**20:.0f} MiB on each of "
        f"{len(plan.devices)} devices (strategy {plan.strategy}, dtype {plan.dtype}; {need / 2**20:.0f} MiB beside the "
        f"process, and there are {room} MiB): give more memory, more devices or a narrower dtype"
    )
