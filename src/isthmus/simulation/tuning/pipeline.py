"""One step of a looped pipeline, event by event (APTMoE, section 3): every device runs its stages in turn, all
micro-batches forward, then all backward (GPipe's flush), and loads its next stage meanwhile.

A micro-batch passes all layers of a stage before it goes to the next stage's device. Its experts run on the accelerator
and on the CPU at once; a layer ends when both are done. A layer's gradients leave when its last micro-batch has left
it, and its optimizer step follows on the CPU. The step begins with nothing on the accelerators and ends when all is
done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from isthmus.simulation.tuning.costs import Seat
from isthmus.simulation.tuning.device import Device
from isthmus.simulation.tuning.events import Events, Record, Server
from isthmus.simulation.tuning.media import Links, Medium
from isthmus.simulation.tuning.policies import StepPolicy
from isthmus.simulation.tuning.work import BACKWARD, FORWARD, Backlog, StepWork
from isthmus.spec.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step took. Sequences are by device."""

    seconds: float
    busy_s: tuple[dict[str, float], ...]
    num_bytes: tuple[dict[str, int], ...]
    cpu_rows: float
    """(token, expert) pairs computed on CPUs, forward and backward, of ``num_rows``."""
    num_rows: float
    num_loads: int
    backlogs: tuple[Backlog, ...]
    """What is left to do during the next step, by device."""
    timelines: tuple[Timeline, ...] = ()


def simulate_step(
    work: StepWork, policy: StepPolicy, *, backlogs: Sequence[Backlog] = (), keeps_spans: bool = False
) -> StepResult:
    """Plays the step through. ``backlogs``: what the step before has left, by device; none: nothing.

    Deterministic; changes nothing but ``policy``'s memory of what it decided.
    """
    pipeline = Pipeline(work, policy, keeps_spans, backlogs)
    pipeline.run()
    devices = pipeline.devices
    seconds = pipeline.events.now_s
    left = tuple(device.backlog() for device in devices)
    timelines: Sequence[Timeline] = ()
    if keeps_spans:
        timelines = [
            Timeline(
                spans=tuple(sorted(d.record.spans or [], key=lambda s: (s.start_s, s.lane))), steps=((0, 0.0, seconds),)
            )
            for d in devices
        ]
    return StepResult(
        seconds=seconds,
        busy_s=tuple(device.record.busy_s for device in devices),
        num_bytes=tuple(device.record.num_bytes for device in devices),
        cpu_rows=sum(device.cpu_rows for device in devices),
        num_rows=sum(device.num_rows for device in devices),
        num_loads=sum(device.loader.num_landed for device in devices),
        backlogs=left,
        timelines=tuple(timelines),
    )


class Hop(NamedTuple):
    """A micro-batch's way from one stage to the next, and what it takes at full rates."""

    source: Device
    target: Device
    run: int
    """Of the target's runs."""
    sending_s: float = 0.0
    network_s: float | None = None
    """None: both are on one host."""
    receiving_s: float = 0.0


class Pipeline:
    """The devices of a step and what they share."""

    def __init__(self, work: StepWork, policy: StepPolicy, keeps_spans: bool, backlogs: Sequence[Backlog]) -> None:
        self.work = work
        self.policy = policy
        self.events = Events()
        costs = work.costs
        self._roots: dict[tuple[int, str], Medium] = {}
        self._memories: dict[int, Medium] = {}
        self._networks = {seat.host_number: Server(self.events) for seat in costs.seats}
        self._num_norms = 0
        self.devices = [
            Device(
                seat, work, policy, self.events, self._links(seat), Record(keeps_spans), self.leave, self.end_norm, left
            )
            for seat, left in zip(costs.seats, backlogs or ((),) * len(costs.seats), strict=True)
        ]
        self._hops = {
            (stage, is_backward): self._hop(stage, is_backward)
            for stage in range(len(work.stages))
            for is_backward in (FORWARD, BACKWARD)
        }

    def _links(self, seat: Seat) -> Links:
        host, card = seat.host, seat.host.accelerator
        rates = {"h2d": card.h2d_bytes_per_s, "d2h": card.d2h_bytes_per_s}
        media: list[tuple[Medium, ...]] = []
        for lane, rate in rates.items():
            shared = [Medium(1.0)]
            # What all together cannot fill is left out: it would change nothing.
            if host.accelerators_per_root * rate > host.root_bytes_per_s:
                shared.append(self._roots.setdefault((seat.root, lane), Medium(host.root_bytes_per_s / rate)))
            if host.num_accelerators * sum(rates.values()) > host.memory_bytes_per_s:
                most = 2 * host.memory_bytes_per_s / sum(rates.values())
                shared.append(self._memories.setdefault(seat.host_number, Medium(most)))
            media.append(tuple(shared))
        return Links(*media)

    def run(self) -> None:
        for device in self.devices:
            device.enter(0)
        first = self.devices[self.work.device_of[0]]
        for number in range(self.work.num_micro_batches):
            first.arrive(0, number)
        self.events.run()
        for device in self.devices:
            device.check_done()

    def end_norm(self) -> None:
        """A layer's gradients are there, and their norm; with the last of all the next step may begin."""
        self._num_norms += 1
        if self._num_norms == len(self.work.costs_of):
            self.events.stop()

    def leave(self, stage: int, is_backward: bool, micro_batch: int) -> None:
        """A micro-batch has left a stage and goes to the one after it."""
        hop = self._hops[stage, is_backward]
        if hop is None:
            return
        if hop.source is hop.target:
            hop.target.arrive(hop.run, micro_batch)
        else:
            hop.source.sender.send(hop.sending_s, self._sent, hop, micro_batch)

    def _hop(self, stage: int, is_backward: bool) -> Hop | None:
        """From ``stage`` to the one after it; None after the last."""
        after = stage - 1 if is_backward else stage + 1
        if after < 0:
            return None
        is_turn = after == len(self.work.stages)
        if is_turn:
            after = stage
        source, target = (self.devices[self.work.device_of[number]] for number in (stage, after))
        run = self.work.number_of_run[after, is_backward or is_turn]
        if source is target:
            return Hop(source, target, run)
        layer = self.work.layer_costs(self.work.stages[stage].first_layer)
        num_bytes = int(layer.num_tokens * layer.row_bytes)
        host, other = source.seat.host, target.seat.host
        network_s = None
        if source.seat.host_number != target.seat.host_number:
            network_s = host.network_s + num_bytes / min(host.network_bytes_per_s, other.network_bytes_per_s)
        return Hop(
            source,
            target,
            run,
            source.copy_s + num_bytes / host.accelerator.d2h_bytes_per_s,
            network_s,
            target.copy_s + num_bytes / other.accelerator.h2d_bytes_per_s,
        )

    def _sent(self, hop: Hop, micro_batch: int) -> None:
        """A micro-batch is in the sending host's memory."""
        if hop.network_s is None:
            self._received(hop, micro_batch)
        else:
            network = self._networks[hop.source.seat.host_number]
            network.serve(hop.network_s, self._received, hop, micro_batch)

    def _received(self, hop: Hop, micro_batch: int) -> None:
        """Likewise in the receiving host's."""
        hop.target.receiver.send(hop.receiving_s, hop.target.arrive, hop.run, micro_batch)
