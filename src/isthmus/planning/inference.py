"""Which devices answer a request, and how: every plan's latency, bytes, exchanges, memory and bound, and the choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from isthmus.planning.block_layout import block_parts
from isthmus.planning.block_steps import original_shares
from isthmus.planning.device_costs import (
    PROCESS_BYTES,
    DeviceCosts,
    block_generation_bytes,
    generation_bytes,
    working_bytes,
)
from isthmus.planning.pieces import held_bytes, pieces_of
from isthmus.planning.plans import Question, plans
from isthmus.planning.shares import divide_layer
from isthmus.planning.step_seconds import least_step_s, sharing, simulate, step_s
from isthmus.planning.steps import Step, Work
from isthmus.planning.subsets import subsets
from isthmus.planning.workload import Workload, device_shares, passes
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.spec.transformer import TransformerSpec

GAIN = 0.03
"""Several devices must be predicted to be so much faster than one, else one is taken: it depends on nobody."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One plan and what it is predicted to take. Tuples are by device, in the plan's order."""

    plan: InferencePlan
    latency_s: float
    first_token_s: float
    """Of ``latency_s``, where tokens are generated; else all of it."""
    compute_s: float
    """Of ``latency_s``; the rest are exchanges, encoding and waiting."""
    bound_s: float
    sent_bytes: tuple[int, ...]
    num_exchanges: int
    memory_bytes: tuple[int, ...]
    """Weights and what computing takes, beside the process itself."""
    budget_bytes: tuple[int, ...]

    @property
    def fits(self) -> bool:
        return all(need <= budget for need, budget in zip(self.memory_bytes, self.budget_bytes, strict=True))


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
    if not candidates:
        raise IsthmusError(
            f"strategies: got {', '.join(question.strategies)} for {len(question.profile.devices)} devices, which "
            "leaves nothing to choose from; name 'single' too, or more devices"
        )
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        raise _too_little_memory(candidates)
    chosen = fitting[0]
    alone = next((candidate for candidate in fitting if candidate.plan.strategy == "single"), None)
    if alone is None:
        reason = "the fastest that fits"
    elif chosen is alone:
        reason = "several devices are predicted to be no faster than one"
    elif chosen.latency_s > (1 - GAIN) * alone.latency_s:
        chosen, reason = alone, f"several devices would gain less than {GAIN:.0%}"
    else:
        reason = f"predicted {alone.latency_s / chosen.latency_s:.2f} times as fast as one device"
    return Choice(chosen=chosen, candidates=tuple(candidates), reason=reason)


def weigh(question: Question) -> Iterator[Candidate]:
    """Every candidate, fitting or not: on every set of a few devices, on sensible ones of many (``subsets``)."""
    for dtype in question.dtypes:
        costs = costs_of(question, dtype)
        for chosen in subsets(question, costs):
            for plan in plans(question, chosen, dtype, costs):
                yield predict(question, plan, costs)


def predict(question: Question, plan: InferencePlan, costs: dict[int, DeviceCosts] | None = None) -> Candidate:
    """What ``plan`` is predicted to take. ``costs`` by rank, where there are some already."""
    if costs is None:
        costs = costs_of(question, plan.dtype, plan.devices)
    devices = [sharing(costs[rank], len(plan.devices), len(question.profile.devices)) for rank in plan.devices]
    all_passes = passes(plan, question.spec, question.request)

    def least_s(step: Step, credits_: list[float]) -> float:
        return least_step_s(step, devices, credits_)

    seconds = [
        simulate(load, count, lambda step, credits_: step_s(step, devices, credits_), devices)
        for load, count in all_passes
    ]
    shares = device_shares(plan, question.spec)
    sent = [[count * num_bytes for num_bytes in load.sent_bytes()] for load, count in all_passes]
    return Candidate(
        plan=plan,
        latency_s=sum(seconds),
        first_token_s=seconds[0],
        compute_s=sum(count * _computing_s(load, devices) for load, count in all_passes),
        bound_s=sum(count * simulate(load, 1, least_s, devices) for load, count in all_passes),
        sent_bytes=tuple(map(sum, zip(*sent, strict=True))),
        num_exchanges=sum(count * load.num_exchanges() for load, count in all_passes),
        memory_bytes=tuple(
            own_bytes + working_bytes(question.spec, share, question.request, len(shares))
            for share, own_bytes in zip(shares, _held_bytes(question.spec, plan, question.request), strict=True)
        ),
        budget_bytes=tuple(question.budget_bytes(rank) for rank in plan.devices),
    )


def _held_bytes(spec: TransformerSpec, plan: InferencePlan, request: InferenceRequest) -> list[int]:
    """Of the weights on each device, and of the cache and the head where tokens are generated."""
    weights = [held_bytes(spec, pieces) for pieces in pieces_of(plan, spec)]
    if not request.num_new_tokens:
        return weights
    if spec.decoupling is None:
        more = [generation_bytes(spec, share, request, plan.dtype) for share in device_shares(plan, spec)]
    else:
        more = []
        words = [len(share.vocabulary) for share in divide_layer(spec, plan.weights)]
        for part, shares, num_words in zip(block_parts(plan, spec), original_shares(plan, spec), words, strict=True):
            own = [share for _, share in part.held(spec)]
            more.append(block_generation_bytes(spec, own, shares, num_words, request, plan.dtype))
    return [held + generating for held, generating in zip(weights, more, strict=True)]


def _computing_s(load: Workload, devices: Sequence[DeviceCosts]) -> float:
    """The slowest device of each step."""
    parts = ((load.before, 1), (load.layer, load.num_layers), (load.after, 1))
    works = ((work, count) for steps, count in parts for step in steps for work in (step.work, step.meanwhile) if work)
    return sum(count * max(map(_work_s, devices, work)) for work, count in works)


def _work_s(device: DeviceCosts, work: Work) -> float:
    return device.work_s(work)


# --- what a plan takes ------------------------------------------------------------------------------------------------


def costs_of(question: Question, dtype: str, ranks: Sequence[int] | None = None) -> dict[int, DeviceCosts]:
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


def _too_little_memory(candidates: Sequence[Candidate]) -> IsthmusError:
    least = min(candidates, key=lambda candidate: max(candidate.memory_bytes))
    need, plan = max(least.memory_bytes), least.plan
    room = ", ".join(f"{budget / 2**20:.0f}" for budget in least.budget_bytes)
    return IsthmusError(
        f"memory: no plan fits; the smallest budget that would is {(need + PROCESS_BYTES) / 2**20:.0f} MiB on each of "
        f"{len(plan.devices)} devices (strategy {plan.strategy}, dtype {plan.dtype}; {need / 2**20:.0f} MiB beside the "
        f"process, and there are {room} MiB): give more memory, more devices or a narrower dtype"
    )
