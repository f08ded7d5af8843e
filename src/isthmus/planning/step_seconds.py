"""Seconds of steps on some devices: all compute, the last one starts the exchange, the slowest link ends it.

Of what is computed while an exchange goes on only the longer counts, and computing takes longer by what sending needs.
A link that lets a burst through after a pause (``LinkProfile``) has a credit, which fills while devices compute. Links
that share a medium take turns on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from isthmus.planning.device_costs import DeviceCosts
from isthmus.planning.steps import Step
from isthmus.planning.workload import Workload


@dataclass(frozen=True, kw_only=True)
class _Times:
    """Seconds of a step, all but what is missing of bursts."""

    computing_s: float
    """Of the slowest device."""
    ready_s: float
    """Until links have something to send, messages' own costs not among it."""
    messages_s: float = 0.0
    links_s: tuple[float, ...] = ()
    """By device: what its bytes take on its link as it was measured."""
    longest_link_s: float = 0.0
    num_bytes: tuple[int, ...] = ()
    """By device, of the busier direction."""
    decoding_s: float = 0.0
    more_airtime_s: float = 0.0
    """Beside what links take."""
    meanwhile_s: float = 0.0
    """Of what is computed while the exchange goes on, and of sending meanwhile."""


class Crew:
    """The devices of a plan, in its order, at work together. Looks up once what a step takes on them."""

    def __init__(self, devices: Sequence[DeviceCosts], slowdown: float = 1.0) -> None:
        """``slowdown``: by how much every byte takes longer than when links were measured."""
        self._devices, self._slowdown = tuple(devices), slowdown
        self._bursts = [device.link.burst_bytes for device in devices]
        self._bursting = [number for number, burst in enumerate(self._bursts) if burst]
        self._rates = [device.link.bytes_per_s / slowdown for device in devices]
        self._times: dict[Step, _Times] = {}

    @staticmethod
    def of(costs: Mapping[int, DeviceCosts], ranks: Sequence[int], num_measured: int) -> Crew:
        """``ranks`` at work instead of the ``num_measured`` of the profile."""
        return Crew([_sharing(costs[rank], len(ranks), num_measured) for rank in ranks])

    def slowed(self, slowdown: float) -> Crew:
        """The same on links that take so many times as long for every byte. It knows what this one knows."""
        crew = Crew(self._devices, slowdown)
        crew._times = self._times
        return crew

    @property
    def can_overlap(self) -> bool:
        """Whether it was measured on all links what computing during an exchange costs."""
        return all(device.link.overlapping is not None for device in self._devices)

    def seconds(
        self, load: Workload, count: int = 1, step_s: Callable[[Step, list[float]], float] | None = None
    ) -> float:
        """Of ``count`` such passes, one after the other. ``step_s`` (None: this one's) gets the links' credits and
        changes them. From the third pass on, and in a pass from the third layer on, all take what that one takes."""
        credits_ = list(self._bursts)
        passes_s = [self._pass_s(load, step_s or self.step_s, credits_) for _ in range(min(count, 3))]
        return sum(passes_s) + (count - len(passes_s)) * passes_s[-1] if count else 0.0

    def steps_s(self, steps: Sequence[Step]) -> float:
        """Of ``steps``, one after the other."""
        credits_ = list(self._bursts)
        return sum(self.step_s(step, credits_) for step in steps)

    def computing_s(self, step: Step) -> float:
        """Of the slowest device, without encoding and decoding."""
        return self._of(step).computing_s

    def step_s(self, step: Step, credits_: list[float]) -> float:
        """Seconds of ``step``. ``credits_``, what is left of each link's burst, change."""
        times = self._of(step)
        self._refill(credits_, times.ready_s + times.messages_s)
        if step.exchange is None:
            return times.ready_s
        transfer_s = times.longest_link_s * self._slowdown
        for number in self._bursting:
            # Up to the burst, bytes cost next to nothing where links were measured, after pauses.
            missing = min(times.num_bytes[number], self._bursts[number]) - credits_[number]
            if missing > 0:
                link_s = times.links_s[number] * self._slowdown + missing / self._rates[number]
                transfer_s = max(transfer_s, link_s)
        self._spend(times.num_bytes, credits_, transfer_s)
        if times.meanwhile_s > transfer_s:
            self._refill(credits_, times.meanwhile_s - transfer_s)
            transfer_s = times.meanwhile_s
        working_s = times.ready_s + times.decoding_s
        busy_s = max(working_s, transfer_s) if step.overlaps else working_s + transfer_s
        return times.messages_s + busy_s + times.more_airtime_s * self._slowdown

    def least_step_s(self, step: Step, credits_: list[float]) -> float:
        """Arithmetic, half a round trip and the link's rate, and nothing else."""
        devices = self._devices
        compute_s = max(device.least_work_s(work) for device, work in zip(devices, step.work, strict=True))
        self._refill(credits_, compute_s)
        if step.exchange is None:
            return compute_s
        num_bytes = [traffic.most_bytes for traffic in step.exchange]
        transfer_s = max(
            max(0.0, count - credit) / rate
            for count, credit, rate in zip(num_bytes, credits_, self._rates, strict=True)
        )
        airtime_s = sum(device.airtime_s(traffic) for device, traffic in zip(devices, step.exchange, strict=True))
        transfer_s = max(transfer_s, airtime_s * self._slowdown)
        self._spend(num_bytes, credits_, transfer_s)
        transfer_s += max(device.link.round_trip_s for device in devices) / 2
        if step.meanwhile:
            # The weights are read once, before or after.
            parts = zip(devices, step.meanwhile, strict=True)
            meanwhile_s = max(device.least_work_s(work, reads=False) for device, work in parts)
            self._refill(credits_, max(0.0, meanwhile_s - transfer_s))
            transfer_s = max(transfer_s, meanwhile_s)
        return max(compute_s, transfer_s) if step.overlaps else compute_s + transfer_s

    def _pass_s(self, load: Workload, step_s: Callable[[Step, list[float]], float], credits_: list[float]) -> float:
        total_s = sum(step_s(step, credits_) for step in load.before)
        layer_s, before = 0.0, list(credits_)
        for _ in range(min(load.num_layers, 3)):
            before = list(credits_)
            layer_s = sum(step_s(step, credits_) for step in load.layer)
            total_s += layer_s
        num_more = max(0, load.num_layers - 3)
        total_s += num_more * layer_s
        for number, burst in enumerate(self._bursts):
            left = credits_[number] + num_more * (credits_[number] - before[number])
            credits_[number] = min(burst, max(0.0, left))
        return total_s + sum(step_s(step, credits_) for step in load.after)

    def _of(self, step: Step) -> _Times:
        if step not in self._times:
            self._times[step] = self._look_up(step)
        return self._times[step]

    def _look_up(self, step: Step) -> _Times:
        devices = self._devices
        worked_s = [device.work_s(work) for device, work in zip(devices, step.work, strict=True)]
        computing_s = max(worked_s)
        if step.exchange is None:
            return _Times(computing_s=computing_s, ready_s=computing_s)
        parts = list(zip(devices, step.exchange, strict=True))
        num_bytes = tuple(traffic.most_bytes for traffic in step.exchange)
        airtime_s = sum(device.airtime_s(traffic) for device, traffic in parts)
        if step.is_prepared:
            return _Times(
                computing_s=computing_s,
                ready_s=computing_s + max(device.link.sum_step_s for device in devices),
                links_s=(0.0,) * len(devices),
                num_bytes=num_bytes,
                more_airtime_s=airtime_s,
            )
        links_s = tuple(device.transfer_s(traffic) for device, traffic in parts)
        messages_s = max(device.messages_s(traffic, computing_s) for device, traffic in parts)
        if step.meanwhile or step.is_rest:
            messages_s += max(device.starting_s for device in devices)
        meanwhile_s = 0.0
        if step.meanwhile:
            more = [
                (device.work_s(work), device.sending_s(traffic))
                for (device, traffic), work in zip(parts, step.meanwhile, strict=True)
            ]
            computing_s += max(more_s for more_s, _ in more)
            meanwhile_s = max(map(sum, more))
        return _Times(
            computing_s=computing_s,
            ready_s=max(
                own_s + device.encode_s(traffic) for own_s, (device, traffic) in zip(worked_s, parts, strict=True)
            ),
            messages_s=messages_s,
            links_s=links_s,
            longest_link_s=max(*links_s, airtime_s),
            num_bytes=num_bytes,
            decoding_s=max(device.decode_s(traffic) for device, traffic in parts),
            meanwhile_s=meanwhile_s,
        )

    def _refill(self, credits_: list[float], seconds: float) -> None:
        for number in self._bursting:
            credits_[number] = min(self._bursts[number], credits_[number] + self._rates[number] * seconds)

    def _spend(self, num_bytes: Sequence[int], credits_: list[float], seconds: float) -> None:
        for number in self._bursting:
            left = credits_[number] + self._rates[number] * seconds - num_bytes[number]
            credits_[number] = min(self._bursts[number], max(0.0, left))


def _sharing(costs: DeviceCosts, num_working: int, num_measured: int) -> DeviceCosts:
    """With ``num_working`` devices at work instead of the ``num_measured`` of the profile."""
    if num_measured == 1:
        return costs
    alone = costs.profile.alone_factor
    factor = alone + (1 - alone) * (num_working - 1) / (num_measured - 1)
    return replace(costs, factor=factor)
