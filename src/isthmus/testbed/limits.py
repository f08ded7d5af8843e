"""The limits of a device as the kernel is told them: CPU quotas and ``tc`` command lines. Pure."""

from __future__ import annotations

import math

from isthmus.spec.testbed import DeviceSpec


def cpu_quota_us(cpu_share: float, quota_s: float) -> tuple[int, int]:
    """(quota, period) in microseconds that give ``cpu_share`` cores, a quota of ``quota_s`` below one core.

    Long quotas let a device compute at full speed for many milliseconds and then stand still while others run, which
    flatters everything that waits for messages.
    """
    quota_us = round(quota_s * 1e6)
    if cpu_share < 1:
        return quota_us, round(quota_us / cpu_share)
    # With periods below the kernel's tick several threads get far less than their share, and one that never has to
    # pause gains nothing from short ones.
    period_us = 10 * quota_us
    return round(cpu_share * period_us), period_us


def num_threads(device: DeviceSpec) -> int:
    """Threads with which a library should compute on the device: its cores, rounded up."""
    return math.ceil(device.cpu_share)


def host_end_commands(link: str, device: DeviceSpec) -> list[list[str]]:
    """Arguments of ``tc`` that limit what goes to the device; they replace whatever limit was there."""
    return [["qdisc", "replace", "dev", link, "root", *_bucket(device)]]


def device_end_commands(link: str, device: DeviceSpec) -> list[list[str]]:
    """As above, of what the device sends, delayed where a delay was asked for."""
    if not device.delay_s:
        return host_end_commands(link, device)
    # netem's own queue must hold what is underway during the delay; the order is the one of tc-netem's manual.
    delay = ["netem", "delay", f"{device.delay_s * 1e6:.0f}us", "limit", "100000"]
    return [
        ["qdisc", "replace", "dev", link, "root", "handle", "1:", *delay],
        ["qdisc", "replace", "dev", link, "parent", "1:1", "handle", "10:", *_bucket(device)],
    ]


def _bucket(device: DeviceSpec) -> list[str]:
    return ["tbf", "rate", f"{device.bandwidth_bits_per_s:.0f}bit", "burst", "64kb", "latency", "400ms"]
