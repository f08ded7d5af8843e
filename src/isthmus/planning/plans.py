"""Which plans are worth weighing for a request, and how each divides its work among devices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from isthmus.planning.device_costs import PROCESS_BYTES, DeviceCosts, weight_bytes, working_bytes
from isthmus.planning.original_choice import OriginalChoice
from isthmus.planning.original_ways import ON_ALL
from isthmus.planning.pieces import weights_bytes
from isthmus.planning.shares import divide, micro_batches
from isthmus.planning.step_seconds import Crew
from isthmus.planning.steps import Work
from isthmus.planning.wire_errors import WIRE_ERRORS, is_within, squared_error
from isthmus.planning.workload import device_shares, passes
from isthmus.spec.cluster import ClusterProfile
from isthmus.spec.inference import (
    CODECS,
    DTYPES,
    GENERATING,
    ORIGINAL_PLANS,
    STRATEGIES,
    InferencePlan,
    InferenceRequest,
)
from isthmus.spec.transformer import LayerShare, TransformerSpec

DTYPE_ERRORS = {"fp32": 0.0, "bf16": 0.03, "int8": 0.1}
"""Relative errors of hidden states to be expected of narrow weights. What a model's really are, ``isthmus bench infer``
measures."""
EVEN = 1.1
"""Devices that differ by less in speed get equal parts."""
ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned. ``memory_bytes``: each device's limit, its process included (None: what is free)."""

    spec: TransformerSpec
    request: InferenceRequest
    profile: ClusterProfile
    memory_bytes: tuple[int | None, ...] = ()
    strategies: tuple[str, ...] = STRATEGIES
    codecs: tuple[str, ...] = ("fp32",)
    max_error: float = math.inf
    """Of what is sent, as ``expected_error`` says. Where it is limited, original layers may have a codec each."""
    dtypes: tuple[str, ...] = ("fp32",)
    is_frugal: bool = False
    """Whether devices may give memory back as soon as it is free, where a request needs that, and keep once what plans
    have in common of a layer, in parts. It takes less memory and more time."""

    def budget_bytes(self, rank: int) -> int:
        free = self.profile.devices[rank].free_memory_bytes
        limit = self.memory_bytes[rank] if self.memory_bytes else None
        return free if limit is None else max(0, min(free, limit - PROCESS_BYTES))


def allowed(max_error: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The (codecs, dtypes) each of whose expected errors is within ``max_error``; FP32 always is. Of a codec it is that
    of one exchange: how many a plan may have, ``Question.max_error`` says."""
    codecs = tuple(name for name in CODECS if WIRE_ERRORS[name] <= max_error)
    dtypes = tuple(name for name in DTYPES if DTYPE_ERRORS[name] <= max_error)
    return codecs, dtypes


def expected_error(plan: InferencePlan, spec: TransformerSpec, request: InferenceRequest) -> float:
    """Relative error of hidden states that what is sent may be expected to cause (``wire_errors``): a token passes
    through all exchanges of a forward pass, and in a pipeline through those between neighbours."""
    if plan.strategy == "pipeline":
        return WIRE_ERRORS[plan.codec] * math.sqrt(len(plan.devices) - 1)
    return math.sqrt(max(squared_error(load.steps) for load, _ in passes(plan, spec, request)))


def plans(
    question: Question, ranks: tuple[int, ...], dtype: str, costs: Mapping[int, DeviceCosts], crews: Sequence[Crew]
) -> Iterator[InferencePlan]:
    """Each once, in ``dtype``, on the devices ``ranks``, whose ``crews`` differ in how slow links are."""
    if len(ranks) == 1:
        if "single" in question.strategies:
            yield InferencePlan(strategy="single", devices=ranks, weights=(1.0,), dtype=dtype)
        return
    form = question.spec.decoupling
    for strategy in ("tensor", "sequence", "pipeline") if form is None else ("block",):
        if strategy not in question.strategies:
            continue
        if strategy not in ("tensor", "block") and question.request.num_new_tokens:
            continue
        if strategy == "pipeline" and len(ranks) > question.spec.num_layers:
            continue
        even = InferencePlan(strategy=strategy, devices=ranks, weights=(1.0,) * len(ranks), dtype=dtype)
        balanced = _balanced(question, even, [costs[rank] for rank in ranks])
        algorithms = ("two_step",)
        if strategy == "tensor":
            algorithms = ("two_step", "mesh") if question.request.num_new_tokens else ("two_step", "mesh", "scatter")
        found = [weights for weights in (even.weights, balanced, _within_memory(question, even, balanced)) if weights]
        if strategy == "pipeline":
            found = [_with_a_layer_each(weights, question.spec.num_layers) for weights in found]
        for weights in dict.fromkeys(found):
            if strategy == "block":
                by_crew = [_block_plans(question, replace(even, weights=weights), crew) for crew in crews]
                yield from dict.fromkeys(itertools.chain.from_iterable(by_crew))
                continue
            for codec, algorithm in itertools.product(question.codecs, algorithms):
                plan = replace(even, weights=weights, codec=codec, algorithm=algorithm)
                if _is_exact_enough(question, plan):
                    yield plan


def _is_exact_enough(question: Question, plan: InferencePlan) -> bool:
    if math.isinf(question.max_error):
        return True
    return is_within(expected_error(plan, question.spec, question.request) ** 2, question.max_error)


def _block_plans(question: Question, plan: InferencePlan, crew: Crew) -> Iterator[InferencePlan]:
    """The fastest way for each original layer, and each way for all of them: memory may not allow the fastest. Each of
    them overlaps exchanges with computing where that is faster, and was measured to cost less than it gains. For each
    codec or, where errors are limited, with the fastest codec within the limit for each layer. Where memory is short,
    also the fastest with each number of layers that every device has as a whole, the others being divided."""
    kinds = tuple(GENERATING) if question.request.num_new_tokens else ORIGINAL_PLANS
    choices = [
        OriginalChoice(replace(plan, overlaps=overlaps), question.spec, question.request, crew.steps_s)
        for overlaps in ((False, True) if crew.can_overlap else (False,))
    ]
    alone = [(codec,) for codec in question.codecs]
    chosen: dict[InferencePlan, None] = {}
    is_short = _is_memory_short(question, plan)
    for codecs in alone if math.isinf(question.max_error) else [question.codecs]:
        for some in (kinds, *((kind,) for kind in kinds)):
            found = [choice.best(some, codecs, question.max_error) for choice in choices]
            fastest = min((each for each in found if each is not None), key=lambda each: each[0], default=None)
            if fastest is not None:
                chosen[fastest[1]] = None
        if is_short:
            some = tuple(kind for kind in kinds if kind == "tensor" or kind in ON_ALL)
            for choice in choices:
                found = choice.by_num_whole(some, codecs, question.max_error)
                chosen |= dict.fromkeys(fastest for _, fastest in found.values())
    yield from chosen


def _is_memory_short(question: Question, plan: InferencePlan) -> bool:
    """Whether some device has too little for original layers as a whole."""
    spec, request, num_devices = question.spec, question.request, len(plan.devices)
    rest = working_bytes(spec, LayerShare.whole(spec), request, num_devices, is_frugal=question.is_frugal)
    needs = zip(plan.devices, weights_bytes(plan, spec), strict=True)
    return any(own + rest > question.budget_bytes(rank) for rank, own in needs)


def _with_a_layer_each(weights: tuple[float, ...], num_layers: int) -> tuple[float, ...]:
    """``weights`` where they give every device of a pipeline a layer; else numbers of layers, those that are missing
    taken from who has most."""
    counts = [len(part) for part in divide(num_layers, weights)]
    if all(counts):
        return weights
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return tuple(map(float, counts))


def _balanced(question: Question, even: InferencePlan, devices: Sequence[DeviceCosts]) -> tuple[float, ...]:
    """Weights with which all devices compute equally long, as far as whole heads and tokens allow."""
    weights = [1.0] * len(devices)
    for _ in range(ROUNDS):
        total = sum(weights)
        seconds = []
        for device, weight in zip(devices, weights, strict=True):
            share = weight / total
            seconds.append(_part_s(question, even, device, share))
        if max(seconds) < EVEN * min(seconds) and weights[0] == weights[-1] and len(set(weights)) == 1:
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
    rest = working_bytes(spec, whole, request, num_devices, is_frugal=question.is_frugal)
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
