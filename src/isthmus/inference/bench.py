"""``isthmus bench infer``: ways of answering one request, in turns on the same devices, beside what was predicted.

Runs once per device (torchrun, ``isthmus testbed run``). Plans answer the same request in turns, so noise of the
machine meets all alike, and the leader's clock counts from asking to having the answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from isthmus.inference.engine import Engine
from isthmus.inference.joining import TIMEOUT_S, is_started_per_device
from isthmus.inference.model import LocalModel
from isthmus.inference.profile import measure_cluster
from isthmus.models.checkpoint_files import resolve_checkpoint
from isthmus.models.shards import ShardReader
from isthmus.planning.inference import Candidate, Question, allowed, choose, predict, weigh
from isthmus.profiling.limits import free_memory_bytes
from isthmus.profiling.network import share_texts, start
from isthmus.reporting.environment import environment
from isthmus.reporting.latency_plot import plot_latency
from isthmus.reporting.latency_table import COLUMNS, NARROW, latency_markdown, latency_table
from isthmus.spec.cluster import ClusterProfile
from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write
from isthmus.spec.inference import STRATEGIES, InferencePlan, InferenceRequest
from isthmus.spec.report import BenchInferReport, BenchInferRow, Spread
from isthmus.spec.serialization import from_json, to_json
from isthmus.transport.base import Group
from isthmus.transport.gloo import GlooGroup
from isthmus.transport.sockets import SocketGroup

_GROUPS: dict[str, type[SocketGroup] | type[GlooGroup]] = {"sockets": SocketGroup, "gloo": GlooGroup}
_WARM_UPS = 2
_WIDE = 120
"""Characters that a table of all columns needs."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What ``isthmus bench infer`` was asked for."""

    model: str
    strategies: tuple[str, ...]
    codecs: tuple[str, ...]
    dtypes: tuple[str, ...] = ("fp32",)
    tokens: int = 128
    batch: int = 1
    repeats: int = 10
    transport: str = "sockets"
    max_error: float = 0.0
    refresh: bool = False
    timeout_s: float = TIMEOUT_S


def parse_names(field: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names in ``a,b`` or all of ``known`` for ``all``. Raises ``IsthmusError`` that names the unknown one."""
    if text == "all":
        return tuple(known)
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if unknown := [name for name in names if name not in known]:
        raise IsthmusError(f"{field}: got {', '.join(unknown)}, wanted all or some of {', '.join(known)}")
    if not names:
        raise IsthmusError(f"{field}: got none, wanted all or some of {', '.join(known)}")
    return names


def bench_infer(options: BenchOptions, *, report: Path | None = None, console: Console | None = None) -> None:
    """Measures, prints and writes. On all but the leader nothing is printed or written. Blocks."""
    console = console or Console()
    if options.repeats < 1:
        raise IsthmusError(f"repeats: got {options.repeats}, wanted 1 or more")
    reader = ShardReader(resolve_checkpoint(options.model))
    request = InferenceRequest(num_tokens=options.tokens, batch=options.batch)
    if options.tokens > reader.spec.max_num_tokens:
        raise IsthmusError(f"tokens: got {options.tokens}, wanted at most the {reader.spec.max_num_tokens} it allows")
    with ExitStack() as stack:
        group: Group | None = None
        if is_started_per_device():
            kind = _GROUPS[options.transport]
            group = stack.enter_context(kind.from_environment(digest=reader.digest(), timeout_s=options.timeout_s))
        if group is not None and group.world_size == 1:
            group = None
        is_leader = group is None or group.rank == 0
        tell: Callable[[str], None] = (lambda text: console.print(f"{text} …")) if is_leader else lambda text: None
        profile = measure_cluster(
            reader,
            group,
            dtypes=tuple(dict.fromkeys(("fp32", *options.dtypes))),
            num_rows=request.batch * request.num_tokens,
            refresh=options.refresh,
            progress=tell,
        )
        entries = _same_on_all(group, _entries(options, reader, request, profile))
        tell(f"timing {len(entries)} plans")
        rows = _run(stack, reader, group, request, entries, options)
        if is_leader:
            found = BenchInferReport(
                config=_config(options),
                environment=environment() | {"profile": json.loads(to_json(profile))},
                rows=rows,
            )
            console.print(latency_table({None: rows}, COLUMNS if console.width >= _WIDE else NARROW))
            if report is not None:
                atomic_write(report, to_json(found))
                atomic_write(report.with_suffix(".md"), latency_markdown(rows))
                plot_latency({None: rows}, report.with_suffix(".png"), title="Ways of answering one request")
            print(json.dumps({"benchmark": "infer", "rows": json.loads(to_json(found))["rows"]}), flush=True)


def _config(options: BenchOptions) -> dict[str, object]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(options).items()}


# --- which plans ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A plan that is timed, and what was predicted of it."""

    plan: InferencePlan
    predicted_s: float
    bound_s: float
    is_choice: bool


def _entries(
    options: BenchOptions, reader: ShardReader, request: InferenceRequest, profile: ClusterProfile
) -> list[_Entry]:
    """For each strategy, codec and dtype the fastest predicted plan of all devices, and the planner's own choice."""
    question = Question(
        spec=reader.spec,
        request=request,
        profile=profile,
        strategies=options.strategies,
        codecs=options.codecs,
        dtypes=options.dtypes,
    )
    everybody = len(profile.devices)
    best: dict[tuple[str, str, str], Candidate] = {}
    for candidate in sorted(weigh(question), key=lambda candidate: candidate.latency_s):
        plan = candidate.plan
        if candidate.fits and len(plan.devices) == (1 if plan.strategy == "single" else everybody):
            best.setdefault((plan.strategy, plan.codec, plan.dtype), candidate)
    codecs, dtypes = allowed(options.max_error)
    choice = choose(
        replace(
            question,
            strategies=STRATEGIES,
            codecs=tuple(name for name in options.codecs if name in codecs) or ("fp32",),
            dtypes=tuple(name for name in options.dtypes if name in dtypes) or ("fp32",),
        )
    ).chosen
    plans = dict.fromkeys([*(candidate.plan for candidate in best.values()), choice.plan])
    return [_entry(question, plan, is_choice=plan == choice.plan) for plan in plans]


def _entry(question: Question, plan: InferencePlan, *, is_choice: bool) -> _Entry:
    predicted = predict(question, plan)
    return _Entry(plan=plan, predicted_s=predicted.latency_s, bound_s=predicted.bound_s, is_choice=is_choice)


def _same_on_all(group: Group | None, entries: list[_Entry]) -> list[_Entry]:
    """The leader's. All devices have the same profile, but not surely the same arithmetic."""
    if group is None:
        return entries
    texts = share_texts(
        group, json.dumps([[to_json(each.plan), each.predicted_s, each.bound_s, each.is_choice] for each in entries])
    )
    return [
        _Entry(plan=from_json(InferencePlan, plan), predicted_s=predicted_s, bound_s=bound_s, is_choice=is_choice)
        for plan, predicted_s, bound_s, is_choice in json.loads(texts[0])
    ]


# --- timing -----------------------------------------------------------------------------------------------------------


def _run(
    stack: ExitStack,
    reader: ShardReader,
    group: Group | None,
    request: InferenceRequest,
    entries: Sequence[_Entry],
    options: BenchOptions,
) -> tuple[BenchInferRow, ...]:
    """Rows on the leader, in the order of ``entries``; on the others none."""
    engines: list[Engine] = []
    known: list[LocalModel] = []
    for entry in entries:
        engine = stack.enter_context(Engine(reader.directory, group=group, plan=entry.plan, known=known))
        engines.append(engine)
        if engine.local_model is not None and engine.local_model not in known:
            known.append(engine.local_model)
    ids_BT = torch.randint(reader.spec.vocab_size, (request.batch, request.num_tokens), generator=_generator())
    attended_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    seconds: list[list[float]] = [[] for _ in entries]
    answers: list[Tensor | None] = [None] * len(entries)
    sent_bytes, num_exchanges = [0] * len(entries), [0] * len(entries)
    for turn in range(_WARM_UPS + options.repeats):
        for step in range(len(entries)):
            index = (turn + step) % len(entries)
            engine = engines[index]
            if group is not None:
                start(group)
            before = engine.stats
            start_s = time.perf_counter()
            if engine.is_leader:
                answers[index] = engine.mean(ids_BT, attended_BT)
            else:
                engine.follow_once()
            if turn >= _WARM_UPS:
                seconds[index].append(time.perf_counter() - start_s)
            after = engine.stats
            if before is not None and after is not None:
                sent_bytes[index] = after.bytes_sent - before.bytes_sent
                num_exchanges[index] = after.num_exchanges - before.num_exchanges
    most_bytes = _most(group, sent_bytes)
    if group is not None and group.rank:
        for engine in reversed(engines):  # as the leader closes them: over gloo each goodbye waits to be heard
            engine.follow()
        return ()
    wanted = _reference(reader, known, ids_BT, attended_BT)
    return tuple(
        replace(
            _row(entry, request, options),
            latency_s=_spread(seconds[index]),
            bytes_sent_per_device=most_bytes[index],
            num_exchanges=num_exchanges[index],
            max_rel_error=_error(answers[index], wanted),
        )
        for index, entry in enumerate(entries)
    )


def _row(entry: _Entry, request: InferenceRequest, options: BenchOptions) -> BenchInferRow:
    """What is known of a row before it is measured."""
    return BenchInferRow(
        strategy=entry.plan.strategy,
        codec=entry.plan.codec,
        dtype=entry.plan.dtype,
        num_devices=len(entry.plan.devices),
        tokens=request.batch * request.num_tokens,
        latency_s=_spread([0.0]),
        predicted_latency_s=entry.predicted_s,
        bound_s=entry.bound_s,
        bytes_sent_per_device=0,
        num_exchanges=0,
        max_rel_error=0.0,
        transport=options.transport if len(entry.plan.devices) > 1 else "none",
        algorithm=entry.plan.algorithm if entry.plan.strategy == "tensor" else "",
        weights=entry.plan.weights,
        is_choice=entry.is_choice,
    )


def _most(group: Group | None, values: list[int]) -> list[int]:
    """Each value's largest over the devices."""
    if group is None:
        return values
    own = torch.tensor(values)
    parts = [torch.empty_like(own) for _ in range(group.world_size)]
    group.all_gather(parts, own)
    return torch.stack(parts).amax(dim=0).tolist()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _reference(reader: ShardReader, known: Sequence[LocalModel], ids_BT: Tensor, attended_BT: Tensor) -> Tensor | None:
    """What this device alone answers in FP32; None where its memory has no room for that."""
    spec = reader.spec
    needed = 5 * spec.num_layers * (spec.attention_numel + spec.mlp_numel)
    plan = InferencePlan.even("single", 1)
    has_it = any(model.num_bytes == 4 * spec.num_layers * (spec.attention_numel + spec.mlp_numel) for model in known)
    if not has_it and free_memory_bytes() < needed:
        return None
    return Engine(reader.directory, plan=plan, known=known).mean(ids_BT, attended_BT)


def _error(answer: Tensor | None, wanted: Tensor | None) -> float | None:
    if answer is None or wanted is None:
        return None
    return float((answer - wanted).abs().max() / wanted.abs().max())


def _spread(seconds: Sequence[float]) -> Spread:
    p10, median, p90 = (float(value) for value in np.quantile(seconds, (0.1, 0.5, 0.9)))
    return Spread(median=median, p10=p10, p90=p90)
