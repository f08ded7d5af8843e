"""Memory, links and time of a step on a cluster that is described: memory by the runtime's own rules, time by the
simulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from isthmus.planning.flights import check_in_flight, smallest_flight
from isthmus.planning.layer_needs import MAPPED_POLICY, Place, mapping_problem
from isthmus.planning.mapping import choose_cuts
from isthmus.planning.memory import (
    AcceleratorMemory,
    Blueprint,
    Footprint,
    accelerator_memory,
    activation_bytes,
    flight_that_fits,
    host_bytes,
    landing_bytes,
    least_dense_bytes,
    minimum_bytes,
    staging_bytes,
)
from isthmus.planning.problem import BYTES_PER_VALUE
from isthmus.planning.stages import map_stages
from isthmus.simulation.tuning.costs import Costs, TuneJob
from isthmus.simulation.tuning.mapping import DEFAULT_ROUNDS, layer_seconds
from isthmus.simulation.tuning.run import Outcome, Popularity
from isthmus.spec.errors import IsthmusError
from isthmus.spec.plan import Stage
from isthmus.spec.plan_tune import DeviceNeed, HostNeed, LinkUse, PredictedStep
from isthmus.spec.tune_cluster import TuneCluster
from isthmus.tuning.preflight.flights import simulate_flights

SIMULATED = {"affinity": "affinity", "paper": "aptmoe", "mobius": "mobius", "gpipe-offload": "gpipe-offload"}
"""The simulator's name of each policy that can be planned for."""
RESOURCES = {
    "accelerator": "accelerators",
    "cpu_experts": "CPUs (experts)",
    "optimizer": "CPUs (optimizer)",
    "h2d": "links to the accelerators",
    "d2h": "links from the accelerators",
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be predicted."""

    blueprint: Blueprint
    cluster: TuneCluster
    micro_batch_size: int
    micro_batches: int
    seq_len: int
    num_stages: int | None
    policy: str
    popularity: Callable[[], Popularity]
    micro_batches_in_flight: int | None = None
    """None: as many as fit."""
    num_steps: int = 2
    """To simulate; 2 where history has something to tell."""

    def costs(self) -> Costs:
        job = TuneJob(
            dtype=self.blueprint.dtype,
            batch=self.micro_batch_size * self.micro_batches,
            seq_len=self.seq_len,
            num_micro_batches=self.micro_batches,
            num_stages=self.num_stages,
        )
        return Costs(self.blueprint.spec, self.cluster, job)

    def check(self) -> None:
        """Raises ``IsthmusError`` for what no memory and no time would make possible."""
        check_in_flight(self.micro_batches_in_flight, self.micro_batches)
        num_layers, num_devices = self.blueprint.spec.num_layers, self.cluster.num_accelerators
        if num_devices > num_layers:
            raise IsthmusError(
                f"cluster: {self.cluster.name} has {num_devices} accelerators, wanted {num_layers} at the most, one "
                "for each of the model's layers; describe fewer"
            )
        if self.num_stages is not None and not num_devices <= self.num_stages <= num_layers:
            raise IsthmusError(
                f"num_stages: got {self.num_stages}, wanted {num_devices}, the accelerators, to {num_layers}, the "
                "layers, since a layer is never cut; leave it out to have it chosen"
            )
        costs = self.costs()
        for device in range(num_devices):
            for layer in range(num_layers):
                costs.layer(device, layer)  # raises where there is no rate for the dtype


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """``step`` is None where it does not fit, or cannot be simulated (``reason``)."""

    devices: tuple[DeviceNeed, ...]
    hosts: tuple[HostNeed, ...]
    links: tuple[LinkUse, ...]
    num_in_flight: int
    """Micro-batches of a flight (``planning.flights``)."""
    step: PredictedStep | None
    skewness: float | None
    reason: str

    @property
    def fits(self) -> bool:
        return not any(need.short_bytes for need in (*self.devices, *self.hosts))


def predict(question: Question) -> Prediction:
    """Blocks for seconds on large models. Raises ``IsthmusError`` as ``Question.check`` does."""
    question.check()
    costs = question.costs()
    memory = _Memory(question, costs, _default_stages(question, costs))
    nothing = Prediction(
        devices=memory.devices,
        hosts=memory.hosts,
        links=(),
        num_in_flight=memory.num_in_flight,
        step=None,
        skewness=None,
        reason="it does not fit",
    )
    if not nothing.fits:
        return nothing
    policy = SIMULATED[question.policy]
    try:
        outcome, skewness = simulate_flights(
            costs, question.popularity, policy, num_in_flight=memory.num_in_flight, num_steps=question.num_steps
        )
    except IsthmusError as error:
        # The simulator asks for room for two whole stages, which experts that come one by one do not need.
        return replace(nothing, reason=str(error))
    if outcome.stages != memory.stages:
        memory = _Memory(question, costs, outcome.stages)
    return Prediction(
        devices=memory.devices,
        hosts=memory.hosts,
        links=_links(question, costs, outcome),
        num_in_flight=memory.num_in_flight,
        step=_step(question, outcome),
        skewness=skewness,
        reason="",
    )


def predict_memory(question: Question) -> tuple[DeviceNeed | HostNeed, ...]:
    """What accelerators and hosts need with as many stages as are asked for, or two for each accelerator."""
    question.check()
    costs = question.costs()
    memory = _Memory(question, costs, _default_stages(question, costs))
    return (*memory.devices, *memory.hosts)


def _default_stages(question: Question, costs: Costs) -> tuple[Stage, ...]:
    """As many as are asked for, or two for each accelerator: equal ones, or by the figures' times and the memory that
    the runtime needs, as it does with what it measures."""
    spec = question.blueprint.spec
    number = question.num_stages or min(spec.num_layers, DEFAULT_ROUNDS * question.cluster.num_accelerators)
    equal = map_stages(spec, num_slots=0, num_stages=number)
    if question.policy != MAPPED_POLICY:
        return equal
    places = [
        Place(host=seat.host_number, root=seat.root, memory_bytes=seat.host.accelerator.memory_bytes)
        for seat in costs.seats
    ]
    problem = mapping_problem(
        question.blueprint,
        places,
        layer_seconds(costs),
        costs.host_memory_bytes,
        question.micro_batches,
        smallest_flight(question.micro_batches, question.micro_batches_in_flight),
    )
    return choose_cuts(problem, equal).stages


class _Memory:
    """What devices and hosts need with these stages, and how many micro-batches are in flight: as many on all."""

    def __init__(self, question: Question, costs: Costs, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self._question, self._costs = question, costs
        number, policy, asked = question.micro_batches, question.policy, question.micro_batches_in_flight
        self._parts = _parts(question, stages, costs.order)
        self.num_in_flight = min(
            flight_that_fits(part, number, policy, self._budget_bytes(device), asked)
            for device, part in self._parts.items()
        )
        self._divided = {device: self._divide(device, part) for device, part in self._parts.items()}
        """None: it does not fit."""
        self.devices = tuple(self._device(device, part) for device, part in self._parts.items())
        self.hosts = self._hosts()

    def _budget_bytes(self, device: int) -> int:
        return self._costs.seats[device].host.accelerator.memory_bytes

    def _least_bytes(self, part: Footprint) -> int:
        least = smallest_flight(self._question.micro_batches, self._question.micro_batches_in_flight)
        return minimum_bytes(part, least, self._question.policy)

    def _divide(self, device: int, part: Footprint) -> AcceleratorMemory | None:
        budget_bytes = self._budget_bytes(device)
        if self._least_bytes(part) > budget_bytes:
            return None
        return accelerator_memory(part, self.num_in_flight, self._question.policy, budget_bytes)

    def _device(self, device: int, part: Footprint) -> DeviceNeed:
        memory, least, budget = self._divided[device], self._least_bytes(part), self._budget_bytes(device)
        return DeviceNeed(
            device=device,
            host=self._costs.seats[device].host_number,
            num_layers=len(part.layers),
            num_stages=len(part.stages) or len(self.stages),
            memory_bytes=budget,
            dense_bytes=memory.dense_bytes if memory else least_dense_bytes(part),
            is_dense_resident=memory is not None and memory.is_dense_resident,
            activation_bytes=activation_bytes(part, self.num_in_flight),
            slot_bytes=part.slot_bytes,
            num_slots=memory.num_slots if memory else 0,
            num_experts=part.num_experts,
            total_bytes=_total_bytes(part, memory, budget) if memory else least,
            minimum_bytes=least,
        )

    def _hosts(self) -> tuple[HostNeed, ...]:
        kinds: dict[int, dict[str, int]] = {}
        for device, part in self._parts.items():
            of_host = kinds.setdefault(self._costs.seats[device].host_number, {})
            for kind, size in (host_bytes(part.layouts.values()) | {"staging": self._staging(device, part)}).items():
                of_host[kind] = of_host.get(kind, 0) + size
        hosts = {seat.host_number: seat.host for seat in self._costs.seats}
        return tuple(
            HostNeed(host=number, name=hosts[number].name, memory_bytes=hosts[number].memory_bytes, kinds_bytes=of_host)
            for number, of_host in sorted(kinds.items())
        )

    def _staging(self, device: int, part: Footprint) -> int:
        """Tokens' buffers, and those of gradients that are added to others."""
        memory = self._divided[device]
        num_bytes = staging_bytes(part, self.num_in_flight)
        if memory is not None and self.num_in_flight < self._question.micro_batches:
            num_bytes += landing_bytes(part, memory)
        return num_bytes


def _parts(question: Question, stages: Sequence[Stage], order: Sequence[int]) -> dict[int, Footprint]:
    """What each device has."""
    own: dict[int, list[Stage]] = {device: [] for device in order}
    for number, stage in enumerate(stages):
        own[order[number % len(order)]].append(stage)
    return {
        device: question.blueprint.part(
            (layer for stage in own[device] for layer in range(stage.first_layer, stage.last_layer + 1)),
            stages=tuple(own[device]) if len(order) > 1 else (),
        )
        for device in sorted(own)
    }


def _total_bytes(part: Footprint, memory: AcceleratorMemory, budget_bytes: int) -> int:
    """Never less than a run takes: one whose activations are smaller has another slot in their place."""
    is_full = memory.num_slots < part.num_experts + part.num_with_gradients
    return budget_bytes if is_full else memory.peak_bytes


def _links(question: Question, costs: Costs, outcome: Outcome) -> tuple[LinkUse, ...]:
    """Accelerators' own links, roots that several share, and networks of several hosts."""
    assert outcome.last is not None
    moved = outcome.last.num_bytes
    links: list[LinkUse] = []
    of_root: dict[int, list[int]] = {}
    for seat in costs.seats:
        card, root = seat.host.accelerator, seat.root
        of_root.setdefault(root, []).append(seat.device)
        links.append(
            LinkUse(
                name=f"accelerator {seat.device}",
                there_bytes=moved[seat.device].get("h2d", 0),
                back_bytes=moved[seat.device].get("d2h", 0),
                there_bytes_per_s=card.h2d_bytes_per_s,
                back_bytes_per_s=card.d2h_bytes_per_s,
            )
        )
    for root, devices in of_root.items():
        rate = costs.seats[devices[0]].host.root_bytes_per_s
        if len(devices) > 1:
            to, back = (sum(moved[device].get(lane, 0) for device in devices) for lane in ("h2d", "d2h"))
            links.append(
                LinkUse(
                    name=f"root {root}", there_bytes=to, back_bytes=back, there_bytes_per_s=rate, back_bytes_per_s=rate
                )
            )
    return (*links, *_networks(question, costs, outcome.stages))


def _networks(question: Question, costs: Costs, stages: Sequence[Stage]) -> list[LinkUse]:
    """Hidden states that go from a stage on one host to the next on another, and their gradients back."""
    spec, order = question.blueprint.spec, costs.order
    rows = question.blueprint.num_tokens * question.micro_batches
    num_bytes = rows * spec.hidden_size * BYTES_PER_VALUE[question.blueprint.dtype]
    sent: dict[int, int] = {}
    received: dict[int, int] = {}
    for number in range(len(stages) - 1):
        before, after = (costs.seats[order[stage % len(order)]].host_number for stage in (number, number + 1))
        if before != after:
            for one, other in ((before, after), (after, before)):
                sent[one] = sent.get(one, 0) + num_bytes
                received[other] = received.get(other, 0) + num_bytes
    rates = {seat.host_number: seat.host.network_bytes_per_s for seat in costs.seats}
    return [
        LinkUse(
            name=f"network of host {host}",
            there_bytes=sent[host],
            back_bytes=received[host],
            there_bytes_per_s=rates[host],
            back_bytes_per_s=rates[host],
        )
        for host in sorted(sent)
    ]


def _step(question: Question, outcome: Outcome) -> PredictedStep:
    last = outcome.last
    assert last is not None
    seconds = float(np.median(outcome.counted))
    shares = {
        name: float(np.mean([busy.get(lane, 0.0) for busy in last.busy_s])) / last.seconds
        for lane, name in RESOURCES.items()
    }
    bound_s = outcome.bound_s * outcome.bubble_factor
    return PredictedStep(
        step_s=seconds,
        tokens_per_s=question.micro_batch_size * question.micro_batches * question.seq_len / seconds,
        num_stages=len(outcome.stages),
        bound_s=bound_s,
        bound_share=bound_s / seconds,
        busy_shares=shares,
        cpu_pairs_share=last.cpu_rows / last.num_rows if last.num_rows else 0.0,
        note=outcome.note,
    )
