"""``isthmus plan infer``: every way of answering a request, what each should take, and which one to take.

In a group (torchrun, ``isthmus testbed run``) the devices and links are measured first, and what was measured is kept;
anywhere else it is looked up by the cluster's devices and the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from isthmus.inference.generation import check_request
from isthmus.inference.joining import TIMEOUT_S, is_started_per_device
from isthmus.inference.profile import measure_cluster
from isthmus.models.checkpoint_files import resolve_checkpoint
from isthmus.models.decoupled.configs import CONFIGS
from isthmus.models.shards import ShardReader
from isthmus.planning.inference import Candidate, Choice, choose
from isthmus.planning.outlook import Outlook, outlook
from isthmus.planning.plans import Question, allowed, expected_error
from isthmus.profiling.cache import find, keep
from isthmus.reporting.environment import environment
from isthmus.reporting.human import human_bytes, human_memory, human_s
from isthmus.reporting.tables import compact_table, print_what_fits
from isthmus.spec.cluster import Cluster, ClusterProfile, read_cluster
from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write
from isthmus.spec.inference import CODECS, DTYPES, InferenceRequest
from isthmus.spec.report import PlanInferReport, PredictedDecoupling, PredictedPlan
from isthmus.spec.serialization import from_json, to_json
from isthmus.transport.base import Group
from isthmus.transport.sockets import SocketGroup


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What ``isthmus plan infer`` was asked for."""

    model: str
    cluster: Path | None = None
    devices: tuple[str, ...] | None = None
    """Names of the cluster's. None: all."""
    profile: Path | None = None
    tokens: int = 128
    batch: int = 1
    new_tokens: int = 0
    codec: str = "fp32"
    """A codec, or ``auto``: such that all that is sent adds an expected error of ``max_error`` at most."""
    dtype: str = "fp32"
    """A dtype, or ``auto``: one whose error is within ``max_error``."""
    max_error: float = 0.0
    refresh: bool = False
    timeout_s: float = TIMEOUT_S


def plan_infer(
    options: PlanOptions,
    *,
    num_rows: int = 20,
    output: Path | None = None,
    report: Path | None = None,
    console: Console | None = None,
) -> Choice | None:
    """Prints the fastest ``num_rows`` plans, why the first is taken, and what decoupling the model would bring; writes
    that plan to ``output`` and what was found to ``report``. None on devices that do not lead. Blocks for seconds where
    it has to measure."""
    reader = ShardReader(resolve_checkpoint(options.model))
    console = console or Console()
    question = _question(options, reader, console)
    if question is None:
        return None
    question, choice = _chosen(question)
    print_candidates(choice, num_rows, console)
    plan = choice.chosen.plan
    devices = ", ".join(question.profile.devices[rank].name for rank in plan.devices)
    error = expected_error(plan, reader.spec, question.request)
    rounded = f"; what is sent is rounded, relative error about {error:.1g}" if error else ""
    console.print(f"→ {plan.strategy} on {devices}: {choice.reason}{rounded}")
    if question.is_frugal:
        console.print("Memory is short: devices give it back as soon as it is free, which takes time not told here.")
    decoupled = None
    if reader.config.model_type in CONFIGS:
        decoupled = outlook(question, choice)
        console.print(outlook_text(decoupled, choice, len(question.profile.devices)), soft_wrap=True)
    if output is not None:
        atomic_write(output, to_json(plan))
    if report is not None:
        atomic_write(report, to_json(_report(options, question, choice, decoupled)))
    return choice


def _chosen(question: Question) -> tuple[Question, Choice]:
    """As devices would answer it: frugal with memory where nothing fits otherwise."""
    try:
        return question, choose(question)
    except IsthmusError:
        frugal = replace(question, is_frugal=True)
        return frugal, choose(frugal)


def _question(options: PlanOptions, reader: ShardReader, console: Console) -> Question | None:
    """What is asked of the planner, with what was measured; None on devices that do not lead."""
    request = InferenceRequest(num_tokens=options.tokens, batch=options.batch, num_new_tokens=options.new_tokens)
    check_request(reader, request)
    if options.devices is not None and options.cluster is None:
        raise IsthmusError("devices: got names without a cluster, wanted --cluster too, which says who they are")
    cluster = read_cluster(options.cluster).select() if options.cluster is not None else None
    codecs, dtypes = _names(options)
    with ExitStack() as stack:
        group: Group | None = None
        if is_started_per_device():
            group = SocketGroup.from_environment(digest=reader.digest(), timeout_s=options.timeout_s)
            stack.enter_context(group)
        profile = _profile(options, reader, cluster, group, dtypes, console)
        if group is not None and group.rank:
            return None
    if cluster is not None and options.devices is not None:
        chosen = cluster.select(options.devices)
        profile = _only(profile, [cluster.devices.index(device) for device in chosen.devices])
        cluster = chosen
    return Question(
        spec=reader.spec,
        request=request,
        profile=profile,
        memory_bytes=tuple(device.memory_bytes for device in cluster.devices) if cluster is not None else (),
        codecs=codecs,
        max_error=options.max_error if options.codec == "auto" else math.inf,
        dtypes=dtypes,
    )


def _names(options: PlanOptions) -> tuple[tuple[str, ...], tuple[str, ...]]:
    codecs, dtypes = allowed(options.max_error)
    for name, value, known in (("codec", options.codec, CODECS), ("dtype", options.dtype, DTYPES)):
        if value != "auto" and value not in known:
            raise IsthmusError(f"{name}: got {value!r}, wanted auto or one of {', '.join(known)}")
    return (
        codecs if options.codec == "auto" else (options.codec,),
        dtypes if options.dtype == "auto" else (options.dtype,),
    )


def _profile(
    options: PlanOptions,
    reader: ShardReader,
    cluster: Cluster | None,
    group: Group | None,
    dtypes: Sequence[str],
    console: Console,
) -> ClusterProfile:
    identity = _identity(reader, cluster)
    num_wanted = len(cluster.devices) if cluster is not None else None
    if options.profile is not None:
        profile = _read_profile(options.profile)
    elif group is None and cluster is not None and len(cluster.devices) > 1:
        profile = find(ClusterProfile, identity)
        if profile is None:
            raise IsthmusError(
                f"cluster: nothing was measured yet of {', '.join(device.name for device in cluster.devices)} with "
                "this model; run the same command on each of them at the same time (torchrun, `isthmus testbed run`), "
                "or name what was measured with --profile"
            )
    else:
        if group is not None and num_wanted not in (None, group.world_size):
            raise IsthmusError(f"cluster: has {num_wanted} devices, but {group.world_size} were started")
        is_leader = group is None or group.rank == 0
        profile = measure_cluster(
            reader,
            group,
            dtypes=dtypes,
            num_rows=options.tokens * options.batch,
            refresh=options.refresh,
            names=None if cluster is None else [device.name for device in cluster.devices],
            progress=lambda text: console.print(f"{text} …") if is_leader else None,
        )
        if is_leader and cluster is not None:
            keep(identity, profile)
    if num_wanted not in (None, len(profile.devices)):
        raise IsthmusError(f"profile: is of {len(profile.devices)} devices, wanted the cluster's {num_wanted}")
    return profile


def _only(profile: ClusterProfile, ranks: Sequence[int]) -> ClusterProfile:
    """Of some of its devices."""
    devices, links = [profile.devices[rank] for rank in ranks], [profile.links[rank] for rank in ranks]
    return replace(profile, devices=tuple(devices), links=tuple(links))


def _identity(reader: ShardReader, cluster: Cluster | None) -> dict[str, object]:
    """A cluster is its devices by name and address, whoever leads."""
    devices = [] if cluster is None else [[device.name, device.address] for device in cluster.devices]
    return {"what": "cluster", "devices": devices, "model": json.loads(to_json(reader.spec))}


def _read_profile(path: Path) -> ClusterProfile:
    """A profile, or the one in a report of ``isthmus bench infer`` or ``isthmus plan infer``."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.get("kind") in ("bench-infer", "plan-infer"):
            content = content["environment"]["profile"]
        return from_json(ClusterProfile, json.dumps(content))
    except OSError as error:
        raise IsthmusError(f"profile: cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError) as error:
        raise IsthmusError(f"profile: {path} holds none: {error}") from error


def print_candidates(choice: Choice, num_rows: int, console: Console) -> None:
    """The fastest plans, and the best of each kind that is slower than those."""
    shown: list[dict[str, str]] = []
    kinds: set[tuple[str, int]] = set()
    for number, candidate in enumerate(choice.candidates):
        kind = (candidate.plan.strategy, len(candidate.plan.devices))
        if number < num_rows or kind not in kinds or candidate is choice.chosen:
            shown.append(_cells(candidate, is_chosen=candidate is choice.chosen))
        kinds.add(kind)
    several = {"dtype"} if len({row["dtype"] for row in shown}) > 1 else set[str]()
    narrow = [name for name in shown[0] if name in _NARROW | several]
    print_what_fits(console, _table(shown, list(shown[0])), _table(shown, narrow))


_TEXTS = ("", "strategy", "parts %", "wire", "dtype")
_NARROW = frozenset({"", "strategy", "devices", "parts %", "wire", "predicted", "sent", "memory"})


def _table(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> Table:
    table = compact_table(columns, texts=_TEXTS, folding=("strategy", "devices", "parts %"))
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    return table


def _cells(candidate: Candidate, *, is_chosen: bool) -> dict[str, str]:
    plan = candidate.plan
    is_even = len(set(plan.weights)) == 1
    total = sum(plan.weights)
    return {
        "": "→" if is_chosen else "" if candidate.fits else "✗",
        "strategy": f"{plan.strategy} {plan.way}".strip(),
        "devices": ",".join(map(str, plan.devices)),
        "parts %": "even" if is_even else ":".join(f"{100 * weight / total:.0f}" for weight in plan.weights),
        "wire": plan.wire if len(plan.devices) > 1 else "",
        "dtype": plan.dtype,
        "predicted": human_s(candidate.latency_s),
        "bound": human_s(candidate.bound_s),
        "computing": human_s(candidate.compute_s),
        "sent": human_bytes(max(candidate.sent_bytes)),
        "exchanges": str(candidate.num_exchanges),
        "memory": human_memory(max(candidate.memory_bytes)) + ("" if candidate.fits else " (too much)"),
    }


# --- what decoupling would bring --------------------------------------------------------------------------------------


def outlook_text(found: Outlook | None, choice: Choice, num_devices: int) -> str:
    """One sentence or two for a model that can be decoupled, and is not."""
    if num_devices == 1:
        return "Decoupling this model would bring nothing here: sub-blocks are for several devices."
    if found is None:
        return "Decoupling this model would bring nothing here: no plan of its decoupled forms fits these devices."
    assert found.spec.decoupling is not None
    form, plan = found.spec.decoupling, found.candidate.plan
    layers = [str(layer) for layer in form.original_layers]
    listed = " and ".join(filter(None, (", ".join(layers[:-1]), layers[-1])))
    what = f"into {form.num_sub_blocks} sub-blocks, layer{'s' if len(layers) > 1 else ''} {listed} original"
    how = f"block parallel on {len(plan.devices)} devices, {plan.wire} wire"
    instead = f"{human_s(found.candidate.latency_s)} ({how}) instead of {human_s(choice.chosen.latency_s)}"
    if not found.is_gain:
        return f"Decoupling this model would bring nothing here: {what}, this request would take {instead}."
    return (
        f"Decoupled {what}, this request would take {instead}: {found.times_as_fast:.2f} × as fast. "
        "See `isthmus decouple MODEL --plan`."
    )


def _report(options: PlanOptions, question: Question, choice: Choice, found: Outlook | None) -> PlanInferReport:
    decoupled = None
    if found is not None and found.spec.decoupling is not None:
        decoupled = PredictedDecoupling(
            num_sub_blocks=found.spec.decoupling.num_sub_blocks,
            original_layers=found.spec.decoupling.original_layers,
            predicted=_predicted(found.candidate),
            times_as_fast=found.times_as_fast,
        )
    return PlanInferReport(
        config=json.loads(json.dumps(vars(options), default=str)),
        environment=environment() | {"profile": json.loads(to_json(question.profile))},
        chosen=_predicted(choice.chosen),
        reason=choice.reason,
        decoupled=decoupled,
    )


def _predicted(candidate: Candidate) -> PredictedPlan:
    return PredictedPlan(
        plan=candidate.plan,
        latency_s=candidate.latency_s,
        first_token_s=candidate.first_token_s,
        bound_s=candidate.bound_s,
        bytes_sent_per_device=max(candidate.sent_bytes),
        num_exchanges=candidate.num_exchanges,
        memory_bytes_per_device=max(candidate.memory_bytes),
    )
