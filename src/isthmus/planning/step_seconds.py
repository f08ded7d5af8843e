"""Seconds of steps on some devices: all compute, the last one starts the exchange, the slowest link ends it.

Of what is computed while an exchange goes on only the longer counts, and computing takes longer by what sending needs.
A link that lets a burst through after a pause (``LinkProfile``) has a credit, which fills while devices compute. Links
that share a medium take turns on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from isthmus.planning.device_costs import DeviceCosts
from isthmus.planning.steps import Step, Work
from isthmus.planning.workload import Workload


def sharing(costs: DeviceCosts, num_working: int, num_measured: int) -> DeviceCosts:
    """With ``num_working`` devices at work instead of the ``num_measured`` of the profile."""
    if num_measured == 1:
        return costs
    alone = costs.profile.alone_factor
    factor = alone + (1 - alone) * (num_working - 1) / (num_measured - 1)
    return replace(costs, factor=factor)


def simulate(
    load: Workload, count: int, seconds_of: Callable[[Step, list[float]], float], devices: Sequence[DeviceCosts]
) -> float:
    """Seconds of ``count`` such passes, one after the other. ``seconds_of`` gets the links' credits and changes them.
    From the third pass on, and in a pass from the third layer on, all take what that one takes."""
    credits_ = [device.link.burst_bytes for device in devices]
    passes_s = [_pass_s(load, seconds_of, credits_, devices) for _ in range(min(count, 3))]
    return sum(passes_s) + (count - len(passes_s)) * passes_s[-1] if count else 0.0


def _pass_s(
    load: Workload,
    seconds_of: Callable[[Step, list[float]], float],
    credits_: list[float],
    devices: Sequence[DeviceCosts],
) -> float:
    total_s = sum(seconds_of(step, credits_) for step in load.before)
    layer_s, before = 0.0, list(credits_)
    for _ in range(min(load.num_layers, 3)):
        before = list(credits_)
        layer_s = sum(seconds_of(step, credits_) for step in load.layer)
        total_s += layer_s
    num_more = max(0, load.num_layers - 3)
    total_s += num_more * layer_s
    for number, device in enumerate(devices):
        left = credits_[number] + num_more * (credits_[number] - before[number])
        credits_[number] = min(device.link.burst_bytes, max(0.0, left))
    return total_s + sum(seconds_of(step, credits_) for step in load.after)


def step_s(step: Step, devices: Sequence[DeviceCosts], credits_: list[float]) -> float:
    compute_s = max(device.work_s(work) for device, work in zip(devices, step.work, strict=True))
    if step.exchange is None:
        _refill(devices, credits_, compute_s)
        return compute_s
    if step.is_prepared:
        seconds = compute_s + max(device.link.sum_step_s for device in devices)
        _refill(devices, credits_, seconds)
        missing_s = max(
            device.missing_s(traffic, credit)
            for device, traffic, credit in zip(devices, step.exchange, credits_, strict=True)
        )
        airtime_s = sum(device.airtime_s(traffic) for device, traffic in zip(devices, step.exchange, strict=True))
        _spend(step, devices, credits_, missing_s)
        return seconds + missing_s + airtime_s
    parts = list(zip(devices, step.work, step.exchange, strict=True))
    computed_s = compute_s
    compute_s = max(device.work_s(work) + device.encode_s(traffic) for device, work, traffic in parts)
    message_s = max(device.messages_s(traffic, computed_s) for device, _, traffic in parts)
    if step.meanwhile or step.is_rest:
        message_s += max(device.starting_s for device in devices)
    _refill(devices, credits_, compute_s + message_s)
    transfer_s = max(
        device.transfer_s(traffic, credit) for (device, _, traffic), credit in zip(parts, credits_, strict=True)
    )
    transfer_s = max(transfer_s, sum(device.airtime_s(traffic) for device, _, traffic in parts))
    _spend(step, devices, credits_, transfer_s)
    compute_s += max(device.decode_s(traffic) for device, _, traffic in parts)
    if step.meanwhile:
        meanwhile_s = max(
            device.work_s(work) + device.sending_s(traffic)
            for device, work, traffic in zip(devices, step.meanwhile, step.exchange, strict=True)
        )
        _refill(devices, credits_, meanwhile_s - transfer_s)
        transfer_s = max(transfer_s, meanwhile_s)
    return message_s + (max(compute_s, transfer_s) if step.overlaps else compute_s + transfer_s)


def least_step_s(step: Step, devices: Sequence[DeviceCosts], credits_: list[float]) -> float:
    """Arithmetic, half a round trip and the link's rate, and nothing else."""
    compute_s = max(device.least_work_s(work) for device, work in zip(devices, step.work, strict=True))
    _refill(devices, credits_, compute_s)
    if step.exchange is None:
        return compute_s
    transfer_s = max(
        max(0.0, traffic.most_bytes - credit) / device.link.bytes_per_s
        for device, traffic, credit in zip(devices, step.exchange, credits_, strict=True)
    )
    airtime_s = sum(device.airtime_s(traffic) for device, traffic in zip(devices, step.exchange, strict=True))
    transfer_s = max(transfer_s, airtime_s)
    _spend(step, devices, credits_, transfer_s)
    transfer_s += max(device.link.round_trip_s for device in devices) / 2
    if step.meanwhile:
        # The weights are read once, before or after.
        meanwhile_s = max(map(_least_more_s, devices, step.meanwhile))
        _refill(devices, credits_, meanwhile_s - transfer_s)
        transfer_s = max(transfer_s, meanwhile_s)
    return max(compute_s, transfer_s) if step.overlaps else compute_s + transfer_s


def _least_more_s(device: DeviceCosts, work: Work) -> float:
    return device.least_work_s(work, reads=False)


def _refill(devices: Sequence[DeviceCosts], credits_: list[float], seconds: float) -> None:
    for number, device in enumerate(devices):
        link = device.link
        credits_[number] = min(link.burst_bytes, credits_[number] + link.bytes_per_s * max(0.0, seconds))


def _spend(step: Step, devices: Sequence[DeviceCosts], credits_: list[float], seconds: float) -> None:
    assert step.exchange is not None
    for number, (device, traffic) in enumerate(zip(devices, step.exchange, strict=True)):
        left = credits_[number] + device.link.bytes_per_s * seconds - traffic.most_bytes
        credits_[number] = min(device.link.burst_bytes, max(0.0, left))
