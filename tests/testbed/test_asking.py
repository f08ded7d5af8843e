"""isthmus.testbed.asking: devices are read as meant, and what cannot be emulated is refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from isthmus.spec.errors import IsthmusError
from isthmus.spec.testbed import DeviceSpec, TestbedSpec
from isthmus.testbed.asking import (
    MAX_DEVICES,
    check_spec,
    parse_cpu,
    parse_device,
    parse_device_numbers,
    parse_devices,
)

DEVICE = DeviceSpec(cpu_share=0.45, bandwidth_bits_per_s=125e6)
SPEC = TestbedSpec(devices=(DEVICE, DEVICE))


def test_device_is_read_as_meant() -> None:
    assert parse_device("cpu=0.2, bandwidth=60mbit,memory=1GiB,delay=1ms", {}, "device 0") == DeviceSpec(
        cpu_share=0.2, bandwidth_bits_per_s=60e6, memory_bytes=1024**3, delay_s=1e-3
    )


def test_device_takes_what_it_leaves_out_from_the_defaults() -> None:
    defaults = {"cpu": "0.5", "bandwidth": "1gbit", "memory": "2GiB"}
    assert parse_device("cpu=2", defaults, "device 0") == DeviceSpec(
        cpu_share=2, bandwidth_bits_per_s=1e9, memory_bytes=2 * 1024**3
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu", r"device 1: got 'cpu', wanted cpu=CORES"),
        ("gpu=1", r"device 1: got 'gpu=1', wanted cpu=CORES"),
        ("cpu=1,cpu=2", r"device 1: cpu is there twice"),
        ("cpu=1", r"device 1: got no bandwidth; give every device both"),
        ("memory=1GiB", r"device 1: got no cpu and no bandwidth"),
        ("cpu=half,bandwidth=1mbit", r"device 1: cpu: got 'half', wanted a number of cores"),
        ("cpu=1,bandwidth=1MB/s", r"device 1: bandwidth: got '1MB/s', wanted bits per second"),
        ("cpu=1,bandwidth=1mbit,memory=x", r"device 1: memory: got 'x'"),
        ("cpu=1,bandwidth=1mbit,delay=5", r"device 1: delay: got '5'"),
    ],
)
def test_bad_device_is_refused_by_part(text: str, message: str) -> None:
    with pytest.raises(IsthmusError, match=message):
        parse_device(text, {}, "device 1")


def test_devices_are_equal_ones_or_listed_ones() -> None:
    defaults = {"cpu": "0.45", "bandwidth": "125mbit"}
    assert parse_devices(2, [], defaults) == (DEVICE, DEVICE)
    listed = parse_devices(None, ["cpu=0.2", ""], defaults)
    assert listed == (dataclasses.replace(DEVICE, cpu_share=0.2), DEVICE)


@pytest.mark.parametrize(("count", "listed"), [(2, ["cpu=1"]), (None, [])])
def test_both_kinds_of_devices_and_none_are_refused(count: int | None, listed: list[str]) -> None:
    with pytest.raises(IsthmusError, match="devices: got "):
        parse_devices(count, listed, {"cpu": "1", "bandwidth": "1mbit"})


def test_device_numbers_keep_their_order() -> None:
    assert parse_device_numbers("2, 0") == (2, 0)
    for text in ("", "1,", "a", "-1", "1 2"):
        with pytest.raises(IsthmusError, match=r"device: got .* such as 0,2"):
            parse_device_numbers(text)


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e3", "", "0,5"])
def test_what_is_no_number_of_cores_is_refused(text: str) -> None:
    with pytest.raises(IsthmusError, match=r"cpu: got .* such as 0.45"):
        parse_cpu(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Lab"}, r"name: got 'Lab', wanted a small letter"),
        ({"name": "a-b"}, r"name: got 'a-b'"),
        ({"name": "elevenchars"}, r"name: got 'elevenchars'"),
        ({"devices": ()}, r"devices: got 0, wanted 1 to"),
        ({"devices": (DEVICE,) * (MAX_DEVICES + 1)}, r"devices: got 201"),
        ({"cpu_quota_s": 1e-4}, r"quota: got 0.0001 s, wanted 1ms to 100ms"),
    ],
)
def test_impossible_testbed_is_refused(change: dict[str, object], message: str) -> None:
    check_spec(SPEC, num_cores=2)
    with pytest.raises(IsthmusError, match=message):
        check_spec(dataclasses.replace(SPEC, **change), num_cores=2)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cpu_share": 2.1}, r"device 1: cpu: got 2.1, wanted 0.001 \(with quotas of 1 ms\) to 2"),
        ({"cpu_share": 0.0}, r"device 1: cpu: got 0, "),
        ({"bandwidth_bits_per_s": 10.0}, r"device 1: bandwidth: got 10 bit/s, wanted 1kbit"),
        ({"memory_bytes": 0}, r"device 1: memory: got 0, "),
        ({"delay_s": -1.0}, r"device 1: delay: got -1 s"),
    ],
)
def test_impossible_device_is_refused_by_number(change: dict[str, float], message: str) -> None:
    devices = (DEVICE, dataclasses.replace(DEVICE, **change))  # pyright: ignore[reportArgumentType]
    with pytest.raises(IsthmusError, match=message):
        check_spec(dataclasses.replace(SPEC, devices=devices), num_cores=2)
