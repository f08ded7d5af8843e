"""What each device computes under a plan, step by step, and the exchange that ends each step.

One function per strategy, side by side with ``inference/strategies``: a change there is a change here, and a test
compares the bytes and the number of exchanges with those of real runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from isthmus.planning.block_steps import block_steps, block_token_steps
from isthmus.planning.exchanges import (
    Exchange,
    all_gather,
    all_reduce,
    broadcast,
    gather,
    pass_on,
    reduce_scatter,
    token_algorithm,
)
from isthmus.planning.shares import divide, divide_layer, micro_batches
from isthmus.planning.steps import Step, Work
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import InferencePlan, InferenceRequest
from isthmus.spec.transformer import LayerShare, Range, TransformerSpec

HEADER_VALUES = 6
"""Numbers that every request begins with: its task, its shape (two), the bytes of its settings, its plan, and whether
freed memory is to be given back."""


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
        num_devices = len(self.steps[0].work)
        exchanges = [step.exchange for step in self.steps if step.exchange is not None]
        return tuple(sum(exchange[device].sent_bytes for exchange in exchanges) for device in range(num_devices))

    def num_exchanges(self) -> int:
        """Of the leader."""
        leaders = [step.exchange[0] for step in self.steps if step.exchange is not None]
        return sum(bool(each.num_sent or each.num_received) for each in leaders)


def device_shares(plan: InferencePlan, spec: TransformerSpec) -> list[LayerShare]:
    """Which part of each layer's weights every device of ``plan`` holds."""
    if plan.strategy == "tensor":
        return divide_layer(spec, plan.weights)
    return [LayerShare.whole(spec)] * len(plan.devices)


def check_strategy(plan: InferencePlan, spec: TransformerSpec) -> None:
    """Raises ``IsthmusError`` for a strategy that the model's form does not allow."""
    if plan.strategy == "block" and spec.decoupling is None:
        raise IsthmusError(
            "strategy: got block for a model that is not decoupled; isthmus decouple makes one that is, or take tensor"
        )
    if plan.strategy not in ("single", "block") and spec.decoupling is not None:
        raise IsthmusError(f"strategy: got {plan.strategy} for a decoupled model; take block")


def layer_ranges(plan: InferencePlan, spec: TransformerSpec) -> list[Range]:
    """Which layers every device of ``plan`` has. Raises ``IsthmusError`` where a pipeline leaves one without."""
    if plan.strategy != "pipeline":
        return [Range(start=0, stop=spec.num_layers)] * len(plan.devices)
    ranges = divide(spec.num_layers, plan.weights)
    if not all(len(part) for part in ranges):
        raise IsthmusError(
            f"strategy: got pipeline for {len(plan.devices)} devices of weights {plan.weights}, which leaves one "
            f"without any of the {spec.num_layers} layers: take fewer devices, or another strategy"
        )
    return ranges


def workload(plan: InferencePlan, spec: TransformerSpec, request: InferenceRequest) -> Workload:
    """What the plan's devices (in its order) do for ``request``: the vector of each sequence (``Engine.mean``)."""
    num_devices = len(plan.devices)
    rows = request.batch * request.num_tokens
    ranges = divide(request.num_tokens, plan.weights)
    own_rows, layer = [rows] * num_devices, ()
    ticks: tuple[Step, ...] = ()
    steps: tuple[Step, ...] = ()
    is_scattered = plan.strategy == "sequence" or (plan.strategy == "tensor" and plan.algorithm == "scatter")
    if is_scattered:
        own_rows = [request.batch * len(part) for part in ranges]
    if spec.decoupling is not None:
        steps, is_scattered = block_steps(plan, spec, request)
    elif plan.strategy == "sequence":
        layer = _sequence_layer(plan, spec, request, ranges)
    elif plan.strategy == "pipeline":
        own_rows, ticks = [0] * num_devices, _pipeline_ticks(plan, spec, request)
    else:
        layer = _tensor_layer(plan, spec, request, own_rows)
    embedding = _embedding(tuple(own_rows))
    if num_devices == 1:
        return Workload(before=(embedding, *steps), layer=layer, after=(), num_layers=spec.num_layers)
    asking = (*_asked(rows, num_devices), embedding, *steps)
    answering: tuple[Step, ...] = ()
    if is_scattered or plan.strategy == "pipeline":
        answering = (_answering(request.batch * spec.hidden_size, num_devices),)
    return Workload(before=asking, layer=layer, after=(*ticks, *answering), num_layers=spec.num_layers)


@lru_cache(maxsize=64)
def _answering(num_values: int, num_devices: int) -> Step:
    """The leader gets everybody's sum."""
    return Step(work=(Work(),) * num_devices, exchange=gather([num_values] * num_devices))


@lru_cache(maxsize=64)
def _embedding(rows: tuple[int, ...]) -> Step:
    return Step(work=tuple(Work(embedded_rows=count) for count in rows), exchange=None)


@lru_cache(maxsize=64)
def _asked(rows: int, num_devices: int) -> tuple[Step, ...]:
    """Everybody learns what comes, and the tokens."""
    idle = (Work(),) * num_devices
    return tuple(Step(work=idle, exchange=broadcast(8 * count, num_devices)) for count in (HEADER_VALUES, 2 * rows))


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
    if spec.decoupling is not None:
        algorithm = token_algorithm(batch * spec.hidden_size, num_devices)
        before += block_token_steps(plan, spec, batch, keys, algorithm)
        head_shares = divide_layer(spec, plan.weights)
        head = tuple(Work(head_rows=batch, head_share=len(s.vocabulary) / spec.vocab_size) for s in head_shares)
        told = None if num_devices == 1 else all_gather("fp32", [3 * batch] * num_devices)[0]
        return Workload(before=before, layer=(), after=(Step(work=head, exchange=told),), num_layers=0)
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


def _tensor_layer(
    plan: InferencePlan, spec: TransformerSpec, request: InferenceRequest, own_rows: list[int]
) -> tuple[Step, ...]:
    """Every device has its heads and columns of all rows, and both blocks end with an all-reduce; with ``scatter`` they
    begin with an all-gather and end with a reduce-scatter."""
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
    if plan.algorithm == "scatter":
        values = [count * spec.hidden_size for count in own_rows]
        summed = reduce_scatter(plan.codec, values)
        [gathered] = _with_exchanges((Work(),) * len(shares), all_gather(plan.codec, values))
        return gathered, *_with_exchanges(attention, [summed]), gathered, *_with_exchanges(mlp, [summed])
    exchanges = all_reduce(plan.codec, rows * spec.hidden_size, len(shares), plan.algorithm)
    return (*_with_exchanges(attention, exchanges), *_with_exchanges(mlp, exchanges))


def _pipeline_ticks(plan: InferencePlan, spec: TransformerSpec, request: InferenceRequest) -> tuple[Step, ...]:
    """In tick t device d computes micro-batch t − d and passes it on. Devices are as far as that from one another,
    though they do not wait for ticks."""
    parts = micro_batches(request.batch, request.num_tokens)
    layers = layer_ranges(plan, spec)
    num_devices = len(layers)
    steps = []
    for tick in range(len(parts) + num_devices - 1):
        at = [tick - device for device in range(num_devices)]
        rows = [len(parts[number]) * request.num_tokens if 0 <= number < len(parts) else 0 for number in at]
        work = tuple(
            Work(
                attention_rows=count,
                attention_share=1.0,
                scores=count * request.num_tokens * spec.num_heads,
                mlp_rows=count,
                mlp_share=1.0,
                num_layers=len(own),
                embedded_rows=count if device == 0 else 0,
            )
            for device, (count, own) in enumerate(zip(rows, layers, strict=True))
        )
        exchange = pass_on(plan.codec, [count * spec.hidden_size for count in rows])
        # What the first micro-batch passes through, nobody has anything else to do for.
        steps.append(Step(work=work, exchange=exchange, overlaps=tick >= num_devices - 1))
    return tuple(steps)


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
