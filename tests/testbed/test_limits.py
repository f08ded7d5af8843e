"""isthmus.testbed.limits: what the kernel is told is what was asked."""

from __future__ import annotations

import dataclasses

import pytest

from isthmus.spec.testbed import DeviceSpec
from isthmus.testbed.limits import cpu_quota_us, device_end_commands, host_end_commands, num_threads

DEVICE = DeviceSpec(cpu_share=0.45, bandwidth_bits_per_s=125e6)


@pytest.mark.parametrize(
    ("cpu_share", "quota_s", "expected"),
    [
        (0.45, 0.001, (1000, 2222)),
        (0.001, 0.001, (1000, 1_000_000)),
        (0.45, 0.002, (2000, 4444)),
        (1.0, 0.001, (10_000, 10_000)),
        (1.5, 0.001, (15_000, 10_000)),
    ],
)
def test_quota_is_the_shortest_that_gives_the_share(
    cpu_share: float, quota_s: float, expected: tuple[int, int]
) -> None:
    assert cpu_quota_us(cpu_share, quota_s) == expected


@pytest.mark.parametrize(("cpu_share", "expected"), [(0.01, 1), (1.0, 1), (1.5, 2), (3.0, 3)])
def test_threads_are_cores_rounded_up(cpu_share: float, expected: int) -> None:
    assert num_threads(dataclasses.replace(DEVICE, cpu_share=cpu_share)) == expected


def test_both_ends_get_the_same_bucket() -> None:
    bucket = [
        "qdisc",
        "replace",
        "dev",
        "x",
        "root",
        "tbf",
        "rate",
        "125000000bit",
        "burst",
        "64kb",
        "latency",
        "400ms",
    ]
    assert host_end_commands("x", DEVICE) == [bucket]
    assert device_end_commands("x", DEVICE) == [bucket]


def test_delay_is_added_where_the_device_sends_only() -> None:
    device = dataclasses.replace(DEVICE, delay_s=0.0015)
    assert host_end_commands("x", device) == host_end_commands("x", DEVICE)
    assert [" ".join(command) for command in device_end_commands("x", device)] == [
        "qdisc replace dev x root handle 1: netem delay 1500us limit 100000",
        "qdisc replace dev x parent 1:1 handle 10: tbf rate 125000000bit burst 64kb latency 400ms",
    ]
