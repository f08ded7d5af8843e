"""``isthmus bench infer``: ways of answering one request, in turns on the same devices, beside what was predicted.

Runs once per device (torchrun, ``isthmus testbed run``). Decoders can be asked for tokens too (``new_tokens``), and a
model's decoupled copy can answer beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from isthmus.inference.generation import check_request
from isthmus.inference.joining import TIMEOUT_S, is_started_per_device
from isthmus.inference.profile import measure_cluster
from isthmus.inference.timing import Timed, time_plans
from isthmus.models.checkpoint_files import resolve_checkpoint
from isthmus.models.shards import ShardReader
from isthmus.planning.inference import Candidate, choose, predict, weigh
from isthmus.planning.plans import Question, allowed
from isthmus.profiling.network import share_texts
from isthmus.reporting.environment import environment
from isthmus.reporting.latency_plot import plot_latency
from isthmus.reporting.latency_table import latency_markdown, print_latency
from isthmus.spec.cluster import ClusterProfile
from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write
from isthmus.spec.inference import STRATEGIES, InferencePlan, InferenceRequest
from isthmus.spec.report import BenchInferReport, BenchInferRow, Spread
from isthmus.spec.serialization import from_json, to_json
from isthmus.transport.base import Group
from isthmus.transport.gloo import GlooGroup
from isthmus.transport.sockets import SocketGroup

_FORM = ("model_type", "decoupling")
"""What of a model's spec is another in its decoupled copy."""
_GROUPS: dict[str, type[SocketGroup] | type[GlooGroup]] = {"sockets": SocketGroup, "gloo": GlooGroup}


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What ``isthmus bench infer`` was asked for."""

    model: str
    decoupled: str | None = None
    """A decoupled copy of ``model``, which answers too."""
    strategies: tuple[str, ...]
    codecs: tuple[str, ...]
    dtypes: tuple[str, ...] = ("fp32",)
    tokens: int = 128
    batch: int = 1
    new_tokens: int = 0
    """0: hidden states are asked for."""
    repeats: int = 10
    transport: str = "sockets"
    max_error: float = 0.0
    refresh: bool = False
    timeout_s: float = TIMEOUT_S


def bench_infer(options: BenchOptions, *, report: Path | None = None, console: Console | None = None) -> None:
    """Measures, prints and writes. On all but the leader nothing is printed or written. Blocks."""
    console = console or Console()
    if options.repeats < 1:
        raise IsthmusError(f"repeats: got {options.repeats}, wanted 1 or more")
    readers = _readers(options)
    request = _request(options, readers.values())
    with ExitStack() as stack:
        group: Group | None = None
        if is_started_per_device():
            kind = _GROUPS[options.transport]
            digest = "+".join(reader.digest() for reader in readers.values())
            group = stack.enter_context(kind.from_environment(digest=digest, timeout_s=options.timeout_s))
        if group is not None and group.world_size == 1:
            group = None
        is_leader = group is None or group.rank == 0
        tell: Callable[[str], None] = (lambda text: console.print(f"{text} …")) if is_leader else lambda text: None
        profile = measure_cluster(
            readers[max(readers)],  # a decoupled model's original layers are of the plain model's shape
            group,
            dtypes=tuple(dict.fromkeys(("fp32", *options.dtypes))),
            num_rows=request.batch * request.num_tokens,
            refresh=options.refresh,
            progress=tell,
        )
        found = [each for reader in readers.values() for each in _entries(options, reader, request, profile)]
        entries = _same_on_all(group, found)
        tell(f"timing {len(entries)} plans")
        trials = [(readers[entry.num_sub_blocks], entry.plan) for entry in entries]
        timed = time_plans(stack, group, request, trials, options.repeats)
        if is_leader:
            rows = tuple(
                _row(entry, each, request, options.transport) for entry, each in zip(entries, timed, strict=True)
            )
            written = BenchInferReport(
                config=_config(options),
                environment=environment() | {"profile": json.loads(to_json(profile))},
                rows=rows,
            )
            print_latency({None: rows}, console)
            if report is not None:
                atomic_write(report, to_json(written))
                atomic_write(report.with_suffix(".md"), latency_markdown(rows))
                plot_latency({None: rows}, report.with_suffix(".png"), title="Ways of answering one request")
            print(json.dumps({"benchmark": "infer", "rows": json.loads(to_json(written))["rows"]}), flush=True)


def _readers(options: BenchOptions) -> dict[int, ShardReader]:
    """The models that answer, by their number of sub-blocks. Raises ``IsthmusError`` where ``options.decoupled`` cannot
    be a copy of the model."""
    reader = ShardReader(resolve_checkpoint(options.model))
    if options.decoupled is None:
        return {reader.spec.num_sub_blocks: reader}
    copy = ShardReader(resolve_checkpoint(options.decoupled))
    if reader.spec.decoupling is not None:
        raise IsthmusError(
            f"model: got {options.model}, which has {reader.spec.num_sub_blocks} sub-blocks, beside a decoupled model; "
            "wanted the one that it was made from"
        )
    if copy.spec.decoupling is None:
        raise IsthmusError(
            f"decoupled: got {options.decoupled}, which has no sub-blocks, wanted what `isthmus decouple` makes of "
            f"{options.model}"
        )
    theirs, ours = vars(reader.spec), vars(copy.spec)
    if others := [name for name in theirs if name not in _FORM and ours[name] != theirs[name]]:
        got, wanted = (", ".join(f"{name} {spec[name]}" for name in others) for spec in (ours, theirs))
        raise IsthmusError(f"decoupled: got {options.decoupled} with {got}, wanted {wanted}, as {options.model} has")
    return {1: reader, copy.spec.num_sub_blocks: copy}


def _request(options: BenchOptions, readers: Iterable[ShardReader]) -> InferenceRequest:
    """Raises ``IsthmusError`` for what cannot be asked of the models."""
    request = InferenceRequest(num_tokens=options.tokens, batch=options.batch, num_new_tokens=options.new_tokens)
    for reader in readers:
        check_request(reader, request)
    if options.new_tokens and options.strategies == ("sequence",):
        raise IsthmusError("strategies: got sequence, wanted single or tensor: who generates divides no tokens")
    return request


def _config(options: BenchOptions) -> dict[str, object]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(options).items()}


# --- which plans ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A plan that is timed, and what was predicted of it."""

    predicted: Candidate
    num_sub_blocks: int
    """Of the model that it is for."""
    is_choice: bool

    @property
    def plan(self) -> InferencePlan:
        return self.predicted.plan


def _entries(
    options: BenchOptions, reader: ShardReader, request: InferenceRequest, profile: ClusterProfile
) -> list[_Entry]:
    """For each strategy, codec, dtype and way of computing original layers the fastest predicted plan of all devices,
    and the planner's own choice."""
    question = Question(
        spec=reader.spec,
        request=request,
        profile=profile,
        strategies=options.strategies,
        codecs=options.codecs,
        dtypes=options.dtypes,
    )
    everybody = len(profile.devices)
    best: dict[tuple[object, ...], Candidate] = {}
    for candidate in sorted(weigh(question), key=lambda candidate: candidate.latency_s):
        plan = candidate.plan
        if candidate.fits and len(plan.devices) == (1 if plan.strategy == "single" else everybody):
            best.setdefault((plan.strategy, plan.codec, plan.dtype, plan.originals), candidate)
    codecs, dtypes = allowed(options.max_error)
    choice = choose(
        replace(
            question,
            strategies=STRATEGIES,
            codecs=tuple(name for name in options.codecs if name in codecs) or ("fp32",),
            max_error=options.max_error,
            dtypes=tuple(name for name in options.dtypes if name in dtypes) or ("fp32",),
        )
    ).chosen
    plans = dict.fromkeys([*(candidate.plan for candidate in best.values()), choice.plan])
    return [
        _Entry(
            predicted=predict(question, plan),
            num_sub_blocks=reader.spec.num_sub_blocks,
            is_choice=plan == choice.plan,
        )
        for plan in plans
    ]


def _same_on_all(group: Group | None, entries: list[_Entry]) -> list[_Entry]:
    """The leader's. All devices have the same profile, but not surely the same arithmetic."""
    if group is None:
        return entries
    texts = share_texts(group, json.dumps([to_json(entry) for entry in entries]))
    return [from_json(_Entry, text) for text in json.loads(texts[0])]


# --- what is reported -------------------------------------------------------------------------------------------------


def _row(entry: _Entry, timed: Timed, request: InferenceRequest, transport: str) -> BenchInferRow:
    plan, predicted = entry.plan, entry.predicted
    later_s = predicted.latency_s - predicted.first_token_s
    return BenchInferRow(
        strategy=plan.strategy,
        codec=plan.wire,
        dtype=plan.dtype,
        num_devices=len(plan.devices),
        tokens=request.batch * request.num_tokens,
        latency_s=_spread(timed.latencies_s),
        predicted_latency_s=predicted.latency_s,
        bound_s=predicted.bound_s,
        bytes_sent_per_device=timed.sent_bytes,
        num_exchanges=timed.num_exchanges,
        max_rel_error=timed.max_rel_error,
        transport=transport if len(plan.devices) > 1 else "none",
        algorithm=plan.way,
        weights=plan.weights,
        is_choice=entry.is_choice,
        num_sub_blocks=entry.num_sub_blocks,
        num_new_tokens=request.num_new_tokens,
        time_to_first_token_s=_spread(timed.first_token_s) if timed.first_token_s else None,
        time_per_token_s=_spread(timed.token_s) if timed.token_s else None,
        predicted_time_to_first_token_s=predicted.first_token_s if timed.first_token_s else None,
        predicted_time_per_token_s=later_s / (request.num_new_tokens - 1) if timed.token_s else None,
    )


def _spread(seconds: Sequence[float]) -> Spread:
    p10, median, p90 = (float(value) for value in np.quantile(seconds, (0.1, 0.5, 0.9)))
    return Spread(median=median, p10=p10, p90=p90)
