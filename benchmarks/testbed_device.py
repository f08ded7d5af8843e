"""What one device of an emulated testbed does for ``decoupled_testbed.py``: a job, whose report the first one writes.

Started once per device:

    python benchmarks/testbed_device.py JOB.json REPORT.json

A job names its ``kind``, the ``models`` (directories by name) and what that kind needs. Plans that are compared answer
in turns in one process, each request after a barrier, so that noise of the machine meets all alike. Devices are
measured, and plans predicted and printed, before any of them is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from isthmus.inference.engine import Engine
from isthmus.inference.layer import Layer
from isthmus.inference.profile import measure_cluster
from isthmus.inference.run import open_engine
from isthmus.inference.runtime_planner import RuntimePlanner
from isthmus.inference.session import Arrangement
from isthmus.inference.timing import Timed, random_prompt, time_engines
from isthmus.models.shards import ShardReader
from isthmus.planning.block_layout import LEAST_DIVIDED_TOKENS
from isthmus.planning.device_costs import PROCESS_BYTES
from isthmus.planning.inference import Candidate, choose, predict, weigh
from isthmus.planning.pieces import Piece, held_bytes, pieces_of
from isthmus.planning.plans import Question
from isthmus.planning.residency import plans_to_keep
from isthmus.profiling.network import share_texts
from isthmus.reporting.environment import environment
from isthmus.spec.cluster import ClusterProfile
from isthmus.spec.inference import ORIGINAL_PLANS, InferencePlan, InferenceRequest
from isthmus.spec.serialization import from_json, to_json
from isthmus.training.heap import return_freed_memory, reuse_freed_memory
from isthmus.transport.base import Group
from isthmus.transport.gloo import GlooGroup
from isthmus.transport.rendezvous import read_environment
from isthmus.transport.sockets import SocketGroup

Job = dict[str, Any]
TIMEOUT_S = 300.0
DEFAULT_TOKENS = 128
"""That the static planner expects where nothing is said (``open_engine``)."""
LEAST_REQUESTS, MOST_REQUESTS = 8, 24
FINAL_REPEATS = 5
"""Of plans that are timed once more, at least."""
Planned = tuple[Question, tuple[InferencePlan, ...], RuntimePlanner]
"""What was planned for, the plans that are kept for it, and who chooses among them."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A plan that is timed. ``transport``: ``sockets`` (ours), or ``gloo`` under our collectives, or ``gloo-own`` with
    gloo's own all-reduce: what is usually written."""

    label: str
    model: str
    plan: InferencePlan
    transport: str = "sockets"
    predicted: Candidate | None = None


class OwnSums(GlooGroup):
    """gloo's own all-reduce instead of ours over its messages."""

    def all_reduce(self, tensor: torch.Tensor, **_: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        own: Any = self.process_group
        own.allreduce([tensor]).wait()


class Device:
    """This device, its readers of the job's models, and its engines, which share what they have read."""

    def __init__(self, job: Job, stack: ExitStack) -> None:
        self.job, self._stack = job, stack
        self.readers = {name: ShardReader(Path(directory)) for name, directory in job["models"].items()}
        digest = " ".join(reader.digest() for reader in self.readers.values())
        self.group: Group = stack.enter_context(SocketGroup.from_environment(digest=digest, timeout_s=TIMEOUT_S))
        self.is_leader = self.group.rank == 0
        self._groups: dict[str, Group] = {"sockets": self.group}
        self._known: dict[str, dict[Piece, Layer]] = {name: {} for name in self.readers}
        self._engines: dict[tuple[str, str, InferencePlan], Engine] = {}

    def tell(self, text: str) -> None:
        if self.is_leader:
            print(text, flush=True)

    def measure(self, model: str, dtypes: Sequence[str] = ("fp32",)) -> ClusterProfile:
        """The devices with this model's layers, and the links as they are now."""
        return measure_cluster(
            self.readers[model],
            self.group,
            dtypes=tuple(dtypes),
            num_rows=max(self.job["tokens"]),
            refresh=self.job.get("refresh", False),
            progress=self.tell,
        )

    def question(self, model: str, profile: ClusterProfile, tokens: int, **changes: Any) -> Question:
        new_tokens = self.job.get("new_tokens", 0)
        request = InferenceRequest(num_tokens=tokens, num_new_tokens=new_tokens)
        return Question(spec=self.readers[model].spec, request=request, profile=profile, **changes)

    def agree(self, make: Callable[[], Sequence[Entry]]) -> list[Entry]:
        """What the leader makes: only it plans."""
        texts = share_texts(self.group, json.dumps([to_json(entry) for entry in make()] if self.is_leader else []))
        return [from_json(Entry, text) for text in json.loads(texts[0])]

    def engine(self, entry: Entry) -> Engine:
        key = entry.model, entry.transport, entry.plan
        if key not in self._engines:
            self._engines[key] = self._stack.enter_context(
                Engine(
                    self.readers[entry.model].directory,
                    group=self._group(entry.transport),
                    plan=entry.plan,
                    known=self._known[entry.model],
                )
            )
        return self._engines[key]

    def session(self, model: str, planned: Planned | None, is_frugal: bool) -> Engine:
        """Keeps the weights of all plans, which are the leader's, and lets its planner choose."""
        texts = [to_json(plan) for plan in planned[1]] if planned is not None else []
        plans = tuple(
            from_json(InferencePlan, text) for text in json.loads(share_texts(self.group, json.dumps(texts))[0])
        )
        planner = planned[2] if planned is not None else None
        arranged = Arrangement(group=self.group, plans=plans, planner=planner, is_frugal=is_frugal)
        engine = Engine(self.readers[model].directory, arranged=arranged, known=self._known[model])
        self._engines[model, "session", plans[0]] = self._stack.enter_context(engine)
        return engine

    def _group(self, transport: str) -> Group:
        if transport not in self._groups:
            kind = OwnSums if transport == "gloo-own" else GlooGroup
            meeting = read_environment()
            meeting["port"] += len(self._groups)
            self._groups[transport] = self._stack.enter_context(kind.connect(**meeting, timeout_s=TIMEOUT_S))
        return self._groups[transport]

    def time(self, entries: Sequence[Entry], tokens: int, repeats: int) -> list[dict[str, Any]]:
        """A row for each, on the leader."""
        for entry in entries:
            self.tell(_told(entry))
        request = InferenceRequest(num_tokens=tokens)
        ids_BT = random_prompt(self.readers[entries[0].model].spec.vocab_size, request)
        engines = [self.engine(entry) for entry in entries]
        found = time_engines(engines, self.group, ids_BT, self.job.get("new_tokens", 0), repeats)
        rows = [_row(entry, timed, tokens) for entry, timed in zip(entries, found, strict=True)]
        for row in rows if self.is_leader else ():
            self.tell(f"{row['label']}: {row['latency_s']['median']:.3f} s")
        return rows if self.is_leader else []

    def end(self) -> None:
        """The others wait for the leader, which closes its engines last to first."""
        if not self.is_leader:
            for engine in reversed(list(self._engines.values())):
                engine.follow()


def _told(entry: Entry) -> str:
    predicted = entry.predicted
    if predicted is None:
        return f"{entry.label}: no prediction"
    return f"{entry.label}: bound {predicted.bound_s:.3f} s, predicted {predicted.latency_s:.3f} s"


def _row(entry: Entry, timed: Timed, tokens: int) -> dict[str, Any]:
    plan, predicted = entry.plan, entry.predicted
    row: dict[str, Any] = {
        "label": entry.label,
        "model": entry.model,
        "transport": entry.transport if len(plan.devices) > 1 else "none",
        "plan": json.loads(to_json(plan)),
        "tokens": tokens,
        "latency_s": spread(timed.latencies_s),
        "latencies_s": timed.latencies_s,
        "bytes_sent_per_device": timed.sent_bytes,
        "num_exchanges": timed.num_exchanges,
    }
    if timed.token_s:
        row["time_per_token_s"] = spread(timed.token_s)
        row["time_to_first_token_s"] = spread(timed.first_token_s)
    if predicted is not None:
        row |= {"predicted_latency_s": predicted.latency_s, "bound_s": predicted.bound_s}
        row |= {"predicted_first_token_s": predicted.first_token_s, "memory_bytes": list(predicted.memory_bytes)}
    return row


def spread(seconds: Sequence[float]) -> dict[str, float]:
    p10, median, p90 = (float(value) for value in np.quantile(seconds, (0.1, 0.5, 0.9)))
    return {"median": median, "p10": p10, "p90": p90}


# --- kinds of jobs ----------------------------------------------------------------------------------------------------


def compare(device: Device) -> dict[str, Any]:
    """The planner's choice for the decoupled models in every codec and dtype; what the job says beside it."""
    job = device.job
    [tokens] = job["tokens"]
    profiles = {name: device.measure(name, job["dtypes"]) for name in device.readers}
    rows = device.time(device.agree(lambda: _compared(device, profiles, tokens)), tokens, job["repeats"])
    return {"rows": rows, "profiles": {name: json.loads(to_json(profile)) for name, profile in profiles.items()}}


def _compared(device: Device, profiles: dict[str, ClusterProfile], tokens: int) -> list[Entry]:
    job, entries = device.job, list[Entry]()

    def add(label: str, question: Question, model: str, plan: InferencePlan) -> None:
        entries.append(Entry(label=label, model=model, plan=plan, predicted=predict(question, plan)))

    for dtype in job["dtypes"]:
        for model in job["decoupled"]:
            for codec in job["codecs"]:
                question = device.question(model, profiles[model], tokens, codecs=(codec,), dtypes=(dtype,))
                add(f"planned {model} {dtype} {codec}", question, model, choose(question).chosen.plan)
                for label, plan in _with_and_without(question).items() if job.get("overlap") else ():
                    add(f"{label} {model} {dtype} {codec}", question, model, plan)
                placements = _even_placements(question) if model in job.get("even", ()) else {}
                for placement, plan in placements.items():
                    add(f"{placement} {model} {dtype} {codec}", question, model, plan)
        for name in job["alone"]:
            question = device.question(name, profiles[name], tokens, dtypes=(dtype,))
            add(f"one device {name} {dtype}", question, name, InferencePlan.even("single", 1, dtype=dtype))
        if job.get("own_tensor"):
            question = device.question("plain", profiles["plain"], tokens, dtypes=(dtype,), strategies=("tensor",))
            fastest = min(_of_everybody(question), key=lambda candidate: candidate.latency_s)
            add(f"tensor plain {dtype}", question, "plain", fastest.plan)
    tensor = InferencePlan.even("tensor", device.group.world_size)
    entries += [Entry(label=name, model="plain", plan=tensor, transport=name) for name in job.get("baselines", ())]
    return entries


def _with_and_without(question: Question) -> dict[str, InferencePlan]:
    """The fastest plan of several devices that exchanges all at once, and the same in portions."""
    links = tuple(replace(link, overlapping=None) for link in question.profile.links)
    plain = choose(replace(question, profile=replace(question.profile, links=links), strategies=("block",))).chosen.plan
    return {"at once": plain, "in portions": replace(plain, overlaps=True)}


def _even_placements(question: Question) -> dict[str, InferencePlan]:
    """Everybody with as many sub-blocks: as published (BP+Allgather), and with the fastest ways of original layers."""
    even = [each for each in _of_everybody(question) if len(set(each.plan.weights)) == 1]
    gather = next(each for each in even if set(each.plan.originals) == {"gather"})
    best = min(even, key=lambda candidate: candidate.latency_s)
    return {"even, gather": gather.plan, "even, best ways": best.plan}


def _of_everybody(question: Question) -> list[Candidate]:
    num_devices = len(question.profile.devices)
    return [each for each in weigh(question) if len(each.plan.devices) == num_devices]


def grid(device: Device) -> dict[str, Any]:
    """For every number of tokens, with the job's ``memory``: the runtime planner's choice among the plans that the
    static one keeps, at first and after some requests that it has answered; and every kind of plan that is predicted to
    take at most ``within`` times the fastest one's seconds. The fastest of many that are timed a few times each is one
    that was lucky, so it is timed again beside both choices, and that counts. Devices are as frugal as planners say,
    but for layers in parts: each plan that is timed has its own."""
    profile = device.measure("decoupled")
    memory, planned = device.job["memory"], None
    if device.is_leader:
        device.tell(f"planning, memory {memory}")
        limits = _tight(device, profile) if memory == "tight" else ()
        question = device.question("decoupled", profile, DEFAULT_TOKENS, memory_bytes=limits)
        residency = plans_to_keep(question)
        question = replace(question, is_frugal=residency.is_frugal)
        planned = question, residency.all_plans, RuntimePlanner(question, residency.all_plans)
    is_frugal = planned is not None and planned[0].is_frugal
    is_frugal = bool(share_texts(device.group, "frugal" if is_frugal else "")[0])
    session = device.session("decoupled", planned, is_frugal)
    cells, rows = list[dict[str, Any]](), []
    for tokens in device.job["tokens"]:
        answered = _answered(device, planned, session, tokens)
        entries = device.agree(
            lambda tokens=tokens, found=answered: _weighed(planned, tokens, device.job, cells, found)
        )
        gives_back = share_texts(device.group, "gives back" if answered.get("gives_back") else "")[0]
        (return_freed_memory if gives_back else reuse_freed_memory)()
        found = device.time(entries, tokens, _repeats(device, entries))
        rows += found
        finalists = device.agree(lambda entries=entries, found=found: _finalists(cells[-1], entries, found))
        if len(finalists) > 1:
            found = device.time(finalists, tokens, _repeats(device, finalists, least=FINAL_REPEATS))
        if device.is_leader:
            cells[-1]["finals"] = found
    return {"cells": cells, "rows": rows, "profile": json.loads(to_json(profile)), "is_frugal": is_frugal}


def _answered(device: Device, planned: Planned | None, session: Engine, tokens: int) -> dict[str, Any]:
    """Requests of one kind as users send them, whose plans the runtime planner chooses: what it chose at first and what
    it settled on, by the plans' numbers, and each request's plan and seconds. Empty but on the leader."""
    asked = InferenceRequest(num_tokens=tokens)
    count, first = 0, 0
    if planned is not None:
        question, kept, planner = planned
        first = planner.choose(asked, may_try=False)
        seconds = predict(replace(question, request=asked), kept[first]).latency_s
        count = min(MOST_REQUESTS, max(LEAST_REQUESTS, int(2 * device.job["cell_s"] / seconds)))
    count = int(share_texts(device.group, str(count))[0])
    ids_BT = random_prompt(session.spec.vocab_size, asked)
    numbers, latencies_s = [], []
    for _ in range(count):
        if planned is None:
            session.follow_once()
            continue
        begun_s = time.perf_counter()
        session.mean(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
        latencies_s.append(time.perf_counter() - begun_s)
        numbers.append(planned[1].index(session.plan))
    if planned is None:
        return {}
    settled = planned[2].choose(asked, may_try=False)
    gives_back = planned[2].gives_back(asked, settled)
    return {
        "first": first,
        "settled": settled,
        "gives_back": gives_back,
        "plans": numbers,
        "latencies_s": latencies_s,
    }


def _weighed(
    planned: Planned | None, tokens: int, job: Job, cells: list[dict[str, Any]], answered: dict[str, Any]
) -> list[Entry]:
    """What is to be timed, by the leader; a cell comes into ``cells``."""
    assert planned is not None
    question, kept, _ = planned
    asked = replace(question, request=replace(question.request, num_tokens=tokens))
    settled, first = (predict(asked, kept[answered[name]]) for name in ("settled", "first"))
    candidates = [settled, first, *_kinds([each for each in weigh(asked) if each.fits], job["within"])]
    candidates = [replace(each, plan=_executed(each.plan, tokens)) for each in candidates]
    fitting = [json.loads(to_json(each.plan)) for each in candidates]
    cell = {"tokens": tokens, "memory": job["memory"], "num_resident": len(kept), "choice_fits": settled.fits}
    cells.append({**cell, "choice": fitting[0], "first_choice": fitting[1], "fitting": fitting, "answered": answered})
    plans = {each.plan: each for each in candidates}
    return [Entry(label=_name(plan), model="decoupled", plan=plan, predicted=each) for plan, each in plans.items()]


def _executed(plan: InferencePlan, tokens: int) -> InferencePlan:
    """What so few tokens make of it: one of all plans that do the same."""
    return replace(plan, overlaps=False) if tokens < LEAST_DIVIDED_TOKENS else plan


def _tight(device: Device, profile: ClusterProfile) -> tuple[int, ...]:
    """So much that no device can hold all of the model."""
    spec = device.readers["decoupled"].spec
    [whole] = pieces_of(InferencePlan.even("single", 1), spec)
    limit = PROCESS_BYTES + int(device.job["tight"] * held_bytes(spec, whole))
    return (limit,) * len(profile.devices)


def _kinds(candidates: Sequence[Candidate], within: float) -> Iterator[Candidate]:
    seen: set[tuple[object, ...]] = set()
    fastest = sorted(candidates, key=lambda candidate: candidate.latency_s)
    for candidate in fastest:
        kind = candidate.plan.strategy, len(candidate.plan.devices), candidate.plan.originals
        if kind not in seen and candidate.latency_s <= within * fastest[0].latency_s:
            seen.add(kind)
            yield candidate


def _name(plan: InferencePlan) -> str:
    devices = ",".join(map(str, plan.devices))
    return f"{plan.strategy} {plan.way} on {devices}" if len(plan.devices) > 1 else plan.strategy


def _finalists(cell: dict[str, Any], entries: Sequence[Entry], rows: Sequence[dict[str, Any]]) -> list[Entry]:
    """Both choices of a cell and the fastest of all ``entries``, whose ``rows`` these are."""
    fastest = min(rows, key=lambda row: row["latency_s"]["median"])["plan"]
    wanted = cell["choice"], cell["first_choice"], fastest
    return [entry for entry, row in zip(entries, rows, strict=True) if row["plan"] in wanted]


def _repeats(device: Device, entries: Sequence[Entry], least: int = 0) -> int:
    """More for short requests: as many turns as fit ``cell_s``, between ``least``, or else ``repeats``, and three times
    that."""
    least = least or device.job["repeats"]
    turn_s = sum(entry.predicted.latency_s for entry in entries if entry.predicted is not None)
    return min(3 * least, max(least, int(device.job["cell_s"] / turn_s)))


def exact(device: Device) -> dict[str, Any]:
    """Hidden states of every way of original layers and every codec beside those of one device in FP32."""
    [tokens] = device.job["tokens"]
    num_devices, spec = device.group.world_size, device.readers["decoupled"].spec
    assert spec.decoupling is not None
    num_originals = len(spec.decoupling.original_layers)
    ids_BT = random_prompt(spec.vocab_size, InferenceRequest(num_tokens=tokens))
    alone = Entry(label="one device", model="decoupled", plan=InferencePlan.even("single", 1))
    wanted_TH = _hidden(device, alone, ids_BT)
    rows = []
    for codec in device.job["codecs"]:
        for way in ORIGINAL_PLANS:
            even = InferencePlan.even("block", num_devices, codec=codec)
            plan = replace(even, originals=(way,) * num_originals)
            found_TH = _hidden(device, Entry(label=way, model="decoupled", plan=plan), ids_BT)
            if wanted_TH is None or found_TH is None:
                continue
            error = float((found_TH - wanted_TH).abs().max() / wanted_TH.abs().max())
            cosine = float(F.cosine_similarity(found_TH.double(), wanted_TH.double(), dim=-1).min())
            rows.append({"way": way, "codec": codec, "max_rel_error": error, "least_cosine": cosine})
            device.tell(f"{way} {codec}: error {error:.1e}, least cosine of a token {cosine:.6f}")
    return {"rows": rows}


def _hidden(device: Device, entry: Entry, ids_BT: torch.Tensor) -> torch.Tensor | None:
    """(T, H) on the leader."""
    engine = device.engine(entry)
    if device.is_leader:
        return engine.hidden(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))[0]
    engine.follow_once()
    return None


def requests(job: Job) -> dict[str, Any] | None:
    """One request after the other with several plans resident, as ``isthmus embed`` answers them; who changes the links
    meanwhile reads on standard output which request it is."""
    [tokens] = job["tokens"]
    rows: list[dict[str, Any]] = []
    options = {"request": InferenceRequest(num_tokens=tokens), "codec": job["codec"], "refresh": True}
    with open_engine(
        job["models"]["decoupled"], tell=partial(print, flush=True), timeout_s=TIMEOUT_S, **options
    ) as engine:
        if not engine.is_leader:
            engine.follow()
            return None
        ids_BT = random_prompt(engine.spec.vocab_size, InferenceRequest(num_tokens=tokens))
        attended_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        for number in range(job["num_requests"]):
            begun_s = time.perf_counter()
            engine.mean(ids_BT, attended_BT)
            latency_s = time.perf_counter() - begun_s
            plan = engine.plan
            rows.append({"plan": json.loads(to_json(plan)), "name": _name(plan), "latency_s": latency_s})
            print(f"request {number}: {_name(plan)}, {latency_s:.3f} s", flush=True)
            time.sleep(job["pause_s"])
    return {"rows": rows}


KINDS: dict[str, Callable[[Device], dict[str, Any]]] = {"compare": compare, "grid": grid, "exact": exact}


@contextmanager
def on_device(job: Job) -> Iterator[Device]:
    with ExitStack() as stack:
        device = Device(job, stack)
        yield device
        device.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("report", type=Path)
    arguments = parser.parse_args()
    job = json.loads(arguments.job.read_text())
    if job["kind"] == "requests":
        found = requests(job)
    else:
        with on_device(job) as device:
            found = KINDS[job["kind"]](device)
    if os.environ["RANK"] == "0":
        arguments.report.write_text(json.dumps({"job": job, "environment": environment()} | (found or {})))


if __name__ == "__main__":
    main()
