"""Which devices answer a request, and how: every plan's latency, bytes, exchanges, memory and bound, and the choice.

Steps follow one another: all devices compute, the last one starts the exchange, the slowest link ends it. A link that
lets a burst through after a pause (``LinkProfile``) has a credit, which fills while devices compute.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from isthmus.planning.block_steps import best_originals, original_shares, sub_blocks_of
from isthmus.planning.device_costs import (
    PROCESS_BYTES,
    DeviceCosts,
    block_weight_bytes,
    generation_bytes,
    weight_bytes,
    working_bytes,
)
from isthmus.planning.shares import divide, micro_batches
from isthmus.planning.steps import Step, Work
from isthmus.planning.workload import Workload, device_shares, layer_ranges, passes
from isthmus.spec.cluster import ClusterProfile
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import CODECS, DTYPES, ORIGINAL_PLANS, STRATEGIES, InferencePlan, InferenceRequest
from isthmus.spec.transformer import TransformerSpec

CODEC_ERRORS = {"fp32": 0.0, "bf16": 0.01, "int8": 0.03, "int4": 0.3}
DTYPE_ERRORS = {"fp32": 0.0, "bf16": 0.03, "int8": 0.1}
"""Relative errors to be expected of hidden states. What a model's really are, ``isthmus bench infer`` measures."""
_GAIN = 0.03
"""Several devices must be predicted to be so much faster than one, else one is taken: it depends on nobody."""
_EVEN = 1.1
"""Devices that differ by less in speed get equal parts."""
_ROUNDS = 4


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


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned. ``memory_bytes``: each device's limit, its process included (None: what is free)."""

    spec: TransformerSpec
    request: InferenceRequest
    profile: ClusterProfile
    memory_bytes: tuple[int | None, ...] = ()
    strategies: tuple[str, ...] = STRATEGIES
    codecs: tuple[str, ...] = ("fp32",)
    dtypes: tuple[str, ...] = ("fp32",)

    def budget_bytes(self, rank: int) -> int:
        free = self.profile.devices[rank].free_memory_bytes
        limit = self.memory_bytes[rank] if self.memory_bytes else None
        return free if limit is None else max(0, min(free, limit - PROCESS_BYTES))


def allowed(max_error: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The (codecs, dtypes) each of whose expected errors is within ``max_error``; FP32 always is."""
    codecs = tuple(name for name in CODECS if CODEC_ERRORS[name] <= max_error)
    dtypes = tuple(name for name in DTYPES if DTYPE_ERRORS[name] <= max_error)
    return codecs, dtypes


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
    elif chosen.latency_s > (1 - _GAIN) * alone.latency_s:
        chosen, reason = alone, f"several devices would gain less than {_GAIN:.0%}"
    else:
        reason = f"predicted {alone.latency_s / chosen.latency_s:.2f} times as fast as one device"
    return Choice(chosen=chosen, candidates=tuple(candidates), reason=reason)


def weigh(question: Question) -> Iterator[Candidate]:
    """Every candidate, fitting or not."""
    ranks = range(len(question.profile.devices))
    for dtype in question.dtypes:
        costs = {rank: _costs(question, rank, dtype) for rank in ranks}
        for size in range(1, len(ranks) + 1):
            for others in itertools.combinations(ranks[1:], size - 1):
                for plan in _plans(question, (0, *others), dtype, costs):
                    yield predict(question, plan, costs)


def predict(question: Question, plan: InferencePlan, costs: dict[int, DeviceCosts] | None = None) -> Candidate:
    """What ``plan`` is predicted to take. ``costs`` by rank, where there are some already."""
    if costs is None:
        costs = {rank: _costs(question, rank, plan.dtype) for rank in plan.devices}
    devices = [_sharing(costs[rank], len(plan.devices), len(question.profile.devices)) for rank in plan.devices]
    all_passes = passes(plan, question.spec, question.request)

    def total_s(step_s: Callable[[Step, list[float]], float]) -> list[float]:
        return [count * _simulate(load, step_s, devices) for load, count in all_passes]

    seconds = total_s(lambda step, credits_: _step_s(step, devices, plan.codec, credits_))
    shares = device_shares(plan, question.spec)
    return Candidate(
        plan=plan,
        latency_s=sum(seconds),
        first_token_s=seconds[0],
        compute_s=sum(count * _computing_s(load, devices) for load, count in all_passes),
        bound_s=sum(total_s(lambda step, credits_: _least_step_s(step, devices, credits_))),
        sent_bytes=tuple(
            sum(count * load.sent_bytes()[device] for load, count in all_passes) for device in range(len(devices))
        ),
        num_exchanges=sum(count * load.num_exchanges() for load, count in all_passes),
        memory_bytes=tuple(
            own_bytes
            + working_bytes(question.spec, share, question.request, len(shares))
            + generation_bytes(question.spec, share, question.request, plan.dtype)
            for share, own_bytes in zip(shares, _held_bytes(question.spec, plan), strict=True)
        ),
        budget_bytes=tuple(question.budget_bytes(rank) for rank in plan.devices),
    )


def _held_bytes(spec: TransformerSpec, plan: InferencePlan) -> list[int]:
    """Of the weights on each device."""
    if spec.decoupling is None:
        pairs = zip(device_shares(plan, spec), layer_ranges(plan, spec), strict=True)
        return [weight_bytes(spec, share, plan.dtype, len(layers)) for share, layers in pairs]
    blocks = ([spec.sub_block(number) for number in range(p.start, p.stop)] for p in sub_blocks_of(plan, spec))
    pairs = zip(blocks, original_shares(plan, spec), strict=True)
    return [block_weight_bytes(spec, own, shares, plan.dtype) for own, shares in pairs]


def _computing_s(load: Workload, devices: Sequence[DeviceCosts]) -> float:
    """The slowest device of each step."""
    parts = ((load.before, 1), (load.layer, load.num_layers), (load.after, 1))
    return sum(count * max(map(_work_s, devices, step.work)) for steps, count in parts for step in steps)


def _work_s(device: DeviceCosts, work: Work) -> float:
    return device.work_s(work)


# --- which plans there are --------------------------------------------------------------------------------------------


def _plans(
    question: Question, ranks: tuple[int, ...], dtype: str, costs: dict[int, DeviceCosts]
) -> Iterator[InferencePlan]:
    if len(ranks) == 1:
        if "single" in question.strategies:
            yield InferencePlan(strategy="single", devices=ranks, weights=(1.0,), dtype=dtype)
        return
    form = question.spec.decoupling
    if form is not None and len(ranks) > form.num_sub_blocks:
        return
    for strategy in ("tensor", "sequence", "pipeline") if form is None else ("block",):
        if strategy not in question.strategies or (strategy != "tensor" and question.request.num_new_tokens):
            continue
        if strategy == "pipeline" and len(ranks) > question.spec.num_layers:
            continue
        even = InferencePlan(strategy=strategy, devices=ranks, weights=(1.0,) * len(ranks), dtype=dtype)
        balanced = _balanced(question, even, [costs[rank] for rank in ranks])
        algorithms = ("two_step",)
        if strategy == "tensor":
            algorithms = ("two_step", "mesh") if question.request.num_new_tokens else ("two_step", "mesh", "scatter")
        for weights in dict.fromkeys((even.weights, balanced, _within_memory(question, even, balanced))):
            if weights is None or (strategy == "pipeline" and not _gives_layers_to_all(weights, question.spec)):
                continue
            for codec in question.codecs:
                if strategy == "block":
                    plan = replace(even, weights=weights, codec=codec)
                    yield from _block_plans(question, plan, [costs[rank] for rank in ranks])
                    continue
                for algorithm in algorithms:
                    yield replace(even, weights=weights, codec=codec, algorithm=algorithm)


def _block_plans(question: Question, plan: InferencePlan, devices: Sequence[DeviceCosts]) -> Iterator[InferencePlan]:
    """The fastest way for each original layer, and each way for all of them: memory may not allow the fastest."""
    form = question.spec.decoupling
    assert form is not None
    devices = [_sharing(device, len(devices), len(question.profile.devices)) for device in devices]

    def seconds_of(steps: Sequence[Step]) -> float:
        credits_ = [device.link.burst_bytes for device in devices]
        return sum(_step_s(step, devices, plan.codec, credits_) for step in steps)

    best = best_originals(plan, question.spec, question.request, seconds_of)
    for originals in dict.fromkeys((best, *((kind,) * len(form.original_layers) for kind in ORIGINAL_PLANS))):
        yield replace(plan, originals=originals)


def _gives_layers_to_all(weights: Sequence[float], spec: TransformerSpec) -> bool:
    return all(len(part) for part in divide(spec.num_layers, weights))


def _balanced(question: Question, even: InferencePlan, devices: Sequence[DeviceCosts]) -> tuple[float, ...]:
    """Weights with which all devices compute equally long, as far as whole heads and tokens allow."""
    weights = [1.0] * len(devices)
    for _ in range(_ROUNDS):
        total = sum(weights)
        seconds = []
        for device, weight in zip(devices, weights, strict=True):
            share = weight / total
            seconds.append(_part_s(question, even, device, share))
        if max(seconds) < _EVEN * min(seconds) and weights[0] == weights[-1] and len(set(weights)) == 1:
            return even.weights
        mean_s = sum(seconds) / len(seconds)
        weights = [weight * mean_s / second for weight, second in zip(weights, seconds, strict=True)]
    return tuple(round(weight / sum(weights), 4) for weight in weights)


def _part_s(question: Question, plan: InferencePlan, device: DeviceCosts, share: float) -> float:
    """Seconds of one layer for a device that has ``share`` of it, heads and tokens taken as divisible."""
    request = question.request
    rows = request.batch * (1 if request.num_new_tokens else request.num_tokens)  # tokens to come take most of the time
    if plan.strategy == "block":
        return device.work_s(Work(block_rows=rows, block_share=share))
    if plan.strategy == "tensor":
        return device.work_s(Work(attention_rows=rows, attention_share=share, mlp_rows=rows, mlp_share=share))
    if plan.strategy == "pipeline":
        rows = len(micro_batches(request.batch, request.num_tokens)[0]) * request.num_tokens
        return share * device.work_s(Work(attention_rows=rows, attention_share=1.0, mlp_rows=rows, mlp_share=1.0))
    own = max(1, round(rows * share))
    return device.work_s(Work(attention_rows=own, attention_share=1.0, mlp_rows=own, mlp_share=1.0))


def _within_memory(question: Question, even: InferencePlan, weights: tuple[float, ...]) -> tuple[float, ...] | None:
    """``weights`` with what does not fit a device's memory moved to the others; None where nothing is to be moved, or
    all together have too little room. For tensor parallelism and pipelines, where weights are memory."""
    if even.strategy not in ("tensor", "pipeline"):
        return None
    spec, request, num_devices = question.spec, question.request, len(weights)
    [whole] = device_shares(replace(even, strategy="single", devices=(0,), weights=(1.0,)), spec)
    total = weight_bytes(spec, whole, even.dtype, spec.num_layers)
    # A head and the unit of columns, or a layer, may be added by rounding.
    slack = 1.0 / spec.num_layers
    if even.strategy == "tensor":
        slack = 1.0 / spec.num_heads + 16.0 / spec.intermediate_size
    rest = working_bytes(spec, whole, request, num_devices)
    most = [max(0.0, (question.budget_bytes(rank) - rest) / total - slack) for rank in even.devices]
    parts = [weight / sum(weights) for weight in weights]
    if sum(most) < 1 or all(part <= limit for part, limit in zip(parts, most, strict=True)):
        return None
    full: set[int] = set()
    while over := [i for i in range(num_devices) if i not in full and parts[i] > most[i]]:
        full |= set(over)
        left = 1 - sum(most[i] for i in full)
        free = sum(weights[i] for i in range(num_devices) if i not in full)
        parts = [most[i] if i in full else left * weights[i] / free for i in range(num_devices)]
    return tuple(round(part, 4) for part in parts)


# --- what a plan takes ------------------------------------------------------------------------------------------------


def _costs(question: Question, rank: int, dtype: str) -> DeviceCosts:
    profile = question.profile
    if dtype not in profile.devices[rank].layers:
        raise IsthmusError(
            f"dtype: {dtype} was not measured on {profile.devices[rank].name}, only "
            f"{', '.join(profile.devices[rank].layers)}; measure it with --dtype {dtype} --refresh"
        )
    return DeviceCosts(profile=profile.devices[rank], link=profile.links[rank], spec=question.spec, dtype=dtype)


def _sharing(costs: DeviceCosts, num_working: int, num_measured: int) -> DeviceCosts:
    """With ``num_working`` devices at work instead of the ``num_measured`` of the profile."""
    if num_measured == 1:
        return costs
    alone = costs.profile.alone_factor
    factor = alone + (1 - alone) * (num_working - 1) / (num_measured - 1)
    return replace(costs, factor=factor)


def _simulate(load: Workload, step_s: Callable[[Step, list[float]], float], devices: Sequence[DeviceCosts]) -> float:
    """Seconds of all steps. ``step_s`` gets the links' credits and changes them. From the third layer on the credits
    are what they were after the second."""
    credits_ = [device.link.burst_bytes for device in devices]
    total_s = sum(step_s(step, credits_) for step in load.before)
    layer_s = 0.0
    for _ in range(min(load.num_layers, 3)):
        layer_s = sum(step_s(step, credits_) for step in load.layer)
        total_s += layer_s
    total_s += max(0, load.num_layers - 3) * layer_s
    return total_s + sum(step_s(step, credits_) for step in load.after)


def _step_s(step: Step, devices: Sequence[DeviceCosts], codec: str, credits_: list[float]) -> float:
    compute_s = max(device.work_s(work) for device, work in zip(devices, step.work, strict=True))
    if step.exchange is None:
        _refill(devices, credits_, compute_s)
        return compute_s
    if step.is_prepared:
        seconds = compute_s + max(device.link.sum_step_s for device in devices)
        _refill(devices, credits_, seconds)
        return seconds
    parts = list(zip(devices, step.work, step.exchange, strict=True))
    computed_s = compute_s
    compute_s = max(device.work_s(work) + device.encode_s(traffic, codec) for device, work, traffic in parts)
    _refill(devices, credits_, compute_s)
    message_s = max(device.messages_s(traffic, computed_s) for device, _, traffic in parts)
    transfer_s = max(
        device.transfer_s(traffic, device.link.burst_bytes - credit)
        for (device, _, traffic), credit in zip(parts, credits_, strict=True)
    )
    _spend(step, devices, credits_, transfer_s)
    compute_s += max(device.decode_s(traffic, codec) for device, _, traffic in parts)
    return message_s + (max(compute_s, transfer_s) if step.overlaps else compute_s + transfer_s)


def _least_step_s(step: Step, devices: Sequence[DeviceCosts], credits_: list[float]) -> float:
    """Arithmetic, half a round trip and the link's rate, and nothing else."""
    compute_s = max(device.least_work_s(work) for device, work in zip(devices, step.work, strict=True))
    _refill(devices, credits_, compute_s)
    if step.exchange is None:
        return compute_s
    transfer_s = max(
        max(0.0, traffic.most_bytes - credit) / device.link.bytes_per_s
        for device, traffic, credit in zip(devices, step.exchange, credits_, strict=True)
    )
    _spend(step, devices, credits_, transfer_s)
    transfer_s += max(device.link.round_trip_s for device in devices) / 2
    return max(compute_s, transfer_s) if step.overlaps else compute_s + transfer_s


def _refill(devices: Sequence[DeviceCosts], credits_: list[float], seconds: float) -> None:
    for number, device in enumerate(devices):
        link = device.link
        credits_[number] = min(link.burst_bytes, credits_[number] + link.bytes_per_s * seconds)


def _spend(step: Step, devices: Sequence[DeviceCosts], credits_: list[float], seconds: float) -> None:
    assert step.exchange is not None
    for number, (device, traffic) in enumerate(zip(devices, step.exchange, strict=True)):
        left = credits_[number] + device.link.bytes_per_s * seconds - traffic.most_bytes
        credits_[number] = min(device.link.burst_bytes, max(0.0, left))


def _too_little_memory(candidates: Sequence[Candidate]) -> IsthmusError:
    least = min(candidates, key=lambda candidate: max(candidate.memory_bytes))
    need, plan = max(least.memory_bytes), least.plan
    room = ", ".join(f"{budget / 2**20:.0f}" for budget in least.budget_bytes)
    return IsthmusError(
        f"memory: no plan fits; the smallest budget that would is {(need + PROCESS_BYTES) / 2**20:.0f} MiB on each of "
        f"{len(plan.devices)} devices (strategy {plan.strategy}, dtype {plan.dtype}; {need / 2**20:.0f} MiB beside the "
        f"process, and there are {room} MiB): give more memory, more devices or a narrower dtype"
    )
