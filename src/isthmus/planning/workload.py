"""What each device computes under a plan, step by step, and the exchange that ends each step.

One function per strategy, side by side with ``inference/strategies``: a change there is a change here, and a test
compares the bytes and the number of exchanges with those of real runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from isthmus.planning.exchanges import Exchange, all_gather, all_reduce, broadcast, gather
from isthmus.planning.shares import divide, divide_layer
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.spec.transformer import LayerShare, Range, TransformerSpec

_HEADER_VALUES = 4
SMALL_VALUES = 8192


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one device computes until the next exchange. Rows are tokens of all sequences."""

    attention_rows: int = 0
    attention_share: float = 0.0
    """Of the elements of attention's matrices."""
    scores: int = 0
    """Pairs of query and key, over heads and sequences."""
    mlp_rows: int = 0
    mlp_share: float = 0.0
    embedded_rows: int = 0
    head_rows: int = 0
    head_share: float = 0.0
    """Of the words that are scored."""
    copied: int = 0
    """Values copied together."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """All devices compute, then exchange."""

    work: tuple[Work, ...]
    exchange: Exchange | None
    is_prepared: bool = False
    """Of a sum that is repeated for every token (``transport/repeated``)."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One request: ``before`` the layers, ``layer`` as often as there are layers, ``after`` them."""

    before: tuple[Step, ...]
    layer: tuple[Step, ...]
    after: tuple[Step, ...]
    num_layers: int

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.before + self.layer * self.num_layers + self.after

    def sent_bytes(self) -> tuple[int, ...]:
        """By device, of the whole request."""
        num_devices = len(self.layer[0].work)
        exchanges = [step.exchange for step in self.steps if step.exchange is not None]
        return tuple(sum(exchange[device].sent_bytes for exchange in exchanges) for device in range(num_devices))

    def num_exchanges(self) -> int:
        """Of the leader, which takes part in all."""
        return sum(step.exchange is not None for step in self.steps)


def device_shares(plan: InferencePlan, spec: TransformerSpec) -> list[LayerShare]:
    """Which part of each layer's weights every device of ``plan`` holds."""
    if plan.strategy == "tensor":
        return divide_layer(spec, plan.weights)
    return [LayerShare.whole(spec)] * len(plan.devices)


def workload(plan: InferencePlan, spec: TransformerSpec, request: InferenceRequest) -> Workload:
    """What the plan's devices (in its order) do for ``request``: the vector of each sequence (``Engine.mean``)."""
    num_devices = len(plan.devices)
    rows = request.batch * request.num_tokens
    if plan.strategy == "sequence":
        ranges = divide(request.num_tokens, plan.weights)
        layer = _sequence_layer(plan, spec, request, ranges)
        own_rows = [request.batch * len(part) for part in ranges]
    else:
        layer = _tensor_layer(plan, spec, request)
        own_rows = [rows] * num_devices
    embedding = Step(work=tuple(Work(embedded_rows=count) for count in own_rows), exchange=None)
    if num_devices == 1:
        return Workload(before=(embedding,), layer=layer, after=(), num_layers=spec.num_layers)
    idle = (Work(),) * num_devices
    asking = (
        Step(work=idle, exchange=broadcast(8 * _HEADER_VALUES, num_devices)),
        Step(work=idle, exchange=broadcast(8 * 2 * rows, num_devices)),
        embedding,
    )
    answering: tuple[Step, ...] = ()
    if plan.strategy == "sequence":
        answering = (Step(work=idle, exchange=gather([request.batch * spec.hidden_size] * num_devices)),)
    return Workload(before=asking, layer=layer, after=answering, num_layers=spec.num_layers)


def passes(plan: InferencePlan, spec: TransformerSpec, request: InferenceRequest) -> list[tuple[Workload, int]]:
    """All forward passes of ``request``, and how often each: of the prompts, then of every new token but the last."""
    whole = workload(plan, spec, request)
    if not request.num_new_tokens:
        return [(whole, 1)]
    token = _token_workload(plan, spec, request)
    return [(replace(whole, after=token.after), 1), (token, request.num_new_tokens - 1)]


def _token_workload(plan: InferencePlan, spec: TransformerSpec, request: InferenceRequest) -> Workload:
    """One more token of each sequence, when half of the new ones are there (``inference/decoding``)."""
    num_devices, batch = len(plan.devices), request.batch
    seen = request.num_tokens + request.num_new_tokens // 2
    keys = min(seen, spec.sliding_window or seen)
    shares = device_shares(plan, spec)
    attention = tuple(
        Work(
            attention_rows=batch,
            attention_share=_attention_share(spec, share),
            scores=batch * keys * len(share.heads),
        )
        for share in shares
    )
    mlp = tuple(Work(mlp_rows=batch, mlp_share=len(share.columns) / spec.intermediate_size) for share in shares)
    head = tuple(Work(head_rows=batch, head_share=len(share.vocabulary) / spec.vocab_size) for share in shares)
    before = (Step(work=(Work(embedded_rows=batch),) * num_devices, exchange=None),)
    if num_devices == 1:
        layer = (Step(work=attention, exchange=None), Step(work=mlp, exchange=None))
        after = (Step(work=head, exchange=None),)
        return Workload(before=before, layer=layer, after=after, num_layers=spec.num_layers)
    num_values = batch * spec.hidden_size
    algorithm = token_algorithm(num_values, num_devices)
    codec = plan.codec if algorithm is None else "fp32"
    exchanges = all_reduce(codec, num_values, num_devices, algorithm or plan.algorithm)
    [told] = all_gather("fp32", [3 * batch] * num_devices)  # the best word's score and number, and whether to stop
    return Workload(
        before=before,
        layer=tuple(
            replace(step, is_prepared=algorithm is not None)
            for step in (*_with_exchanges(attention, exchanges), *_with_exchanges(mlp, exchanges))
        ),
        after=(Step(work=head, exchange=told),),
        num_layers=spec.num_layers,
    )


def token_algorithm(num_values: int, num_devices: int) -> Literal["doubling", "mesh"] | None:
    """How so few values are best summed, in FP32: up to here an exchange is bound by latency, and few messages are
    faster than few bytes. None: as larger ones are."""
    if num_values > SMALL_VALUES:
        return None
    return "mesh" if num_devices & (num_devices - 1) else "doubling"


def _tensor_layer(plan: InferencePlan, spec: TransformerSpec, request: InferenceRequest) -> tuple[Step, ...]:
    """Every device has its heads and columns of all rows, and both blocks end with an all-reduce."""
    rows = request.batch * request.num_tokens
    shares = device_shares(plan, spec)
    attention = tuple(
        Work(
            attention_rows=rows,
            attention_share=_attention_share(spec, share),
            scores=rows * request.num_tokens * len(share.heads),
        )
        for share in shares
    )
    mlp = tuple(Work(mlp_rows=rows, mlp_share=len(share.columns) / spec.intermediate_size) for share in shares)
    if len(shares) == 1:
        return Step(work=attention, exchange=None), Step(work=mlp, exchange=None)
    exchanges = all_reduce(plan.codec, rows * spec.hidden_size, len(shares), plan.algorithm)
    return (*_with_exchanges(attention, exchanges), *_with_exchanges(mlp, exchanges))


def _sequence_layer(
    plan: InferencePlan, spec: TransformerSpec, request: InferenceRequest, ranges: list[Range]
) -> tuple[Step, ...]:
    """Every device has its tokens, and gathers all keys and values. What a layer computes after the exchange and the
    next layer before it lie together; here a layer's work comes before its exchange, which costs the same."""
    kv_values = 2 * request.batch * spec.num_kv_heads * spec.head_size
    work = []
    for part in ranges:
        rows = request.batch * len(part)
        work.append(
            Work(
                attention_rows=rows,
                attention_share=1.0,
                scores=rows * request.num_tokens * spec.num_heads,
                mlp_rows=rows,
                mlp_share=1.0,
                copied=kv_values * (len(part) + request.num_tokens),
            )
        )
    gathered = all_gather(plan.codec, [kv_values * len(part) for part in ranges])
    return _with_exchanges(tuple(work), gathered)


def _with_exchanges(work: tuple[Work, ...], exchanges: list[Exchange]) -> tuple[Step, ...]:
    """The work before the first exchange, nothing before the others."""
    idle = (Work(),) * len(work)
    return tuple(Step(work=idle if number else work, exchange=each) for number, each in enumerate(exchanges))


def _attention_share(spec: TransformerSpec, share: LayerShare) -> float:
    heads, kv_heads = len(share.heads), len(share.kv_heads(spec))
    return (heads + kv_heads) / (spec.num_heads + spec.num_kv_heads)
