"""Ways of answering one request on simulated devices: single, tensor, sequence and pipeline for the model as it is, and
for its decoupled form each way of computing the original layers; beside them what the planner would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from isthmus.planning.inference import Candidate, choose, weigh
from isthmus.planning.plans import Question
from isthmus.simulation.profiles import SOCKETS, Transport, cluster_profile
from isthmus.spec.inference import InferenceRequest
from isthmus.spec.report import BenchInferRow, Spread
from isthmus.spec.simulated import SimulatedDevice
from isthmus.spec.transformer import TransformerSpec

TRANSPORT = "simulated"
"""Of every row, which tells it from a measured one."""


def at_bandwidth(devices: Sequence[SimulatedDevice], bits_per_s: float | None) -> tuple[SimulatedDevice, ...]:
    """The same devices on links of that rate (None: their own); where they are wireless it is the medium's."""
    return tuple(device if bits_per_s is None else replace(device, bits_per_s=bits_per_s) for device in devices)


def question_of(
    spec: TransformerSpec,
    request: InferenceRequest,
    devices: Sequence[SimulatedDevice],
    *,
    codecs: Sequence[str] = ("fp32",),
    dtypes: Sequence[str] = ("fp32",),
    transport: Transport = SOCKETS,
) -> Question:
    """What the planner would be asked on these devices."""
    return Question(
        spec=spec,
        request=request,
        profile=cluster_profile(devices, spec, dtypes, transport),
        codecs=tuple(codecs),
        dtypes=tuple(dtypes),
    )


def simulate(
    spec: TransformerSpec,
    request: InferenceRequest,
    devices: Sequence[SimulatedDevice],
    *,
    codecs: Sequence[str] = ("fp32",),
    dtypes: Sequence[str] = ("fp32",),
) -> tuple[BenchInferRow, ...]:
    """The fastest plan of each way that memory allows, with as many devices as the way can use, and the planner's
    choice for ``spec``: fastest first. Raises ``IsthmusError`` where nothing fits."""
    question = question_of(spec, request, devices, codecs=codecs, dtypes=dtypes)
    choice = choose(question)
    found = _ways(choice.candidates)
    if choice.chosen not in found:
        found.append(choice.chosen)
    rows = [_row(each, spec, request, is_choice=each is choice.chosen) for each in found]
    if spec.decoupling is not None:  # beside what it was made from
        plain = replace(spec, decoupling=None)
        others = _ways(list(weigh(question_of(plain, request, devices, codecs=codecs, dtypes=dtypes))))
        rows += [_row(each, plain, request, is_choice=False) for each in others]
    if request.batch == 1:  # one sequence passes through a pipeline as it would through one device
        rows = [row for row in rows if row.strategy != "pipeline"]
    return tuple(sorted(rows, key=lambda row: row.latency_s.median))


def _ways(candidates: Sequence[Candidate]) -> list[Candidate]:
    """One of each strategy, way, codec and dtype: of those on the most devices the fastest. Of plans that compute
    original layers in several ways only one."""
    best: dict[tuple[str, ...], Candidate] = {}
    for each in sorted(candidates, key=lambda each: (-len(each.plan.devices), each.latency_s)):
        plan = each.plan
        if each.fits:
            way = "mixed" if len(set(plan.originals)) > 1 else plan.way
            best.setdefault((plan.strategy, way, plan.codec, plan.dtype), each)
    return list(best.values())


def _row(candidate: Candidate, spec: TransformerSpec, request: InferenceRequest, *, is_choice: bool) -> BenchInferRow:
    plan, new_tokens = candidate.plan, request.num_new_tokens
    later_s = candidate.latency_s - candidate.first_token_s
    return BenchInferRow(
        strategy=plan.strategy,
        codec=plan.codec,
        dtype=plan.dtype,
        num_devices=len(plan.devices),
        tokens=request.batch * request.num_tokens,
        latency_s=_exactly(candidate.latency_s),
        predicted_latency_s=candidate.latency_s,
        bound_s=candidate.bound_s,
        bytes_sent_per_device=max(candidate.sent_bytes),
        num_exchanges=candidate.num_exchanges,
        transport=TRANSPORT,
        algorithm=plan.way,
        weights=plan.weights,
        is_choice=is_choice,
        num_sub_blocks=spec.num_sub_blocks,
        num_new_tokens=new_tokens,
        time_to_first_token_s=_exactly(candidate.first_token_s) if new_tokens else None,
        time_per_token_s=_exactly(later_s / (new_tokens - 1)) if new_tokens > 1 else None,
        predicted_time_to_first_token_s=candidate.first_token_s if new_tokens else None,
        predicted_time_per_token_s=later_s / (new_tokens - 1) if new_tokens > 1 else None,
    )


def _exactly(seconds: float) -> Spread:
    return Spread(median=seconds, p10=seconds, p90=seconds)
