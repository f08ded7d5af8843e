"""Devices that are known by name, from published figures, and those that a file describes.

Where each figure is from, and what is assumed where nothing was published:

- **Products.** HPL's share of the processor's peak is what large products reach; in FP32 vectors hold twice as many
  values as in HPL's FP64. Raspberry Pi 4B: 4 Cortex-A72 at 1.5 GHz, 8 FP32 operations a cycle, 48 GFLOP/s peak; HPL
  gets 11.4 of 24 in FP64 (the same chip on a Compute Module 4, geerlingguy/top500-benchmark, issue 33). Raspberry Pi 5:
  4 Cortex-A76 at 2.4 GHz, 16 a cycle, 154 peak; HPL 30.2 of 76.8 (issue 18). Where no HPL was found the Pi 4B's share
  is taken, ``PEAK_SHARE``: Jetson Orin Nano 8 GB (NVIDIA's data sheet: 6 Cortex-A78AE at 1.5 GHz, 16 a cycle; GPU of
  1024 cores at 625 MHz, 2 a cycle) and a laptop of 2017 (Core i5-8250U: 4 cores at their base of 1.6 GHz, 32 a cycle).
- **8-bit weights** are multiplied as fast as FP32 ones, only read faster. bf16: none of these processors has it.
- **Memory.** Raspberry Pi 4B: STREAM's triad 4.84 GB/s (sci-pi.org.uk/bench/stream.html). Raspberry Pi 5: twice the 5.7
  GB/s that tinymembench copies (geerlingguy/sbc-reviews, issue 21), two thirds of LPDDR4X's 17.1. The others: two
  thirds of 68 GB/s (LPDDR5, 128 bits) and of 38.4 (DDR4-2400, two channels).
- **Links.** Gigabit Ethernet. A round trip through a switch takes 0.2 ms, over Wi-Fi 3 ms: assumed.
- **Wi-Fi 5**, two antennas, 80 MHz: 533 Mbit/s of the 867 arrive as TCP's payload (AnandTech's review of the MacBook
  Air of 2013). That is of one medium for all: see ``SimulatedDevice.is_wireless``.
- **Operators** of PyTorch take 15 µs to start, as measured on emulated devices of this class; on the GPU 30 µs.

isthmus computes on processors. ``jetson-orin-nano-gpu`` is what its plans would take if layers ran on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from isthmus.spec.errors import IsthmusError
from isthmus.spec.serialization import from_json
from isthmus.spec.simulated import DeviceEntry, SimulatedCluster, SimulatedDevice, check_number

PEAK_SHARE = 11.43 / 24
_GIB = 1 << 30
_ETHERNET_BITS_PER_S = 1e9
_ETHERNET_ROUND_TRIP_S = 2e-4


def _device(
    name: str, flops_per_s: float, memory_bytes_per_s: float, memory_gib: int, operator_s: float = 1.5e-5
) -> SimulatedDevice:
    return SimulatedDevice(
        name=name,
        flops_per_s={"fp32": flops_per_s, "int8": flops_per_s},
        memory_bytes_per_s=memory_bytes_per_s,
        memory_bytes=memory_gib * _GIB,
        bits_per_s=_ETHERNET_BITS_PER_S,
        round_trip_s=_ETHERNET_ROUND_TRIP_S,
        operator_s=operator_s,
    )


_LAPTOP = _device("laptop-ethernet", PEAK_SHARE * 4 * 32 * 1.6e9, 38.4e9 * 2 / 3, 8)
KINDS: dict[str, SimulatedDevice] = {
    device.name: device
    for device in (
        _device("raspberry-pi-4b", 2 * 11.43e9, 4.84e9, 4),
        _device("raspberry-pi-5", 2 * 30.2e9, 11.4e9, 8),
        _device("jetson-orin-nano", PEAK_SHARE * 6 * 16 * 1.5e9, 68e9 * 2 / 3, 8),
        _device("jetson-orin-nano-gpu", PEAK_SHARE * 1024 * 2 * 0.625e9, 68e9 * 2 / 3, 8, operator_s=3e-5),
        _LAPTOP,
        replace(_LAPTOP, name="laptop-wifi5", bits_per_s=533e6, round_trip_s=3e-3, is_wireless=True),
    )
}


def kind(name: str) -> SimulatedDevice:
    """Raises ``IsthmusError`` that lists those there are."""
    if name not in KINDS:
        raise IsthmusError(f"device: got {name!r}, wanted one of {', '.join(KINDS)}")
    return KINDS[name]


def devices_of(names: Sequence[str], num_devices: int | None) -> tuple[SimulatedDevice, ...]:
    """``num_devices`` of the one that is named, or one of each that is, the leader first."""
    if len(names) > 1 and num_devices not in (None, len(names)):
        raise IsthmusError(
            f"num_devices: got {num_devices} for {len(names)} names, wanted one name, or as many devices"
        )
    count = num_devices or 1
    check_number(len(names) if len(names) > 1 else count)
    found = [kind(name) for name in names]
    return tuple(found * count if len(found) == 1 else found)


def read_devices(path: Path) -> tuple[SimulatedDevice, ...]:
    """Those that the file describes (``SimulatedCluster``). Raises ``IsthmusError`` that names file and field."""
    try:
        cluster = from_json(SimulatedCluster, path.read_text())
        devices = [device for entry in cluster.devices for device in _expand(entry)]
    except OSError as error:
        raise IsthmusError(f"cluster: cannot read {path}: {error.strerror or error}; wanted a JSON file") from error
    except ValueError as error:
        raise IsthmusError(f"cluster: {path}: {error}") from error
    names = [device.name for device in devices]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise IsthmusError(f"cluster: {path}: name: {twice[0]!r} is there twice, wanted each device once")
    return tuple(devices)


def _expand(entry: DeviceEntry) -> list[SimulatedDevice]:
    own = {field.name for field in fields(DeviceEntry)} - {"name", "count", "kind"}
    given = {name: value for name in sorted(own) if (value := getattr(entry, name)) is not None}
    if entry.kind is not None:
        device = replace(kind(entry.kind), name=entry.name, **given)
    else:
        optional = {"operator_s", "is_wireless"}
        if missing := sorted(own - optional - given.keys()):
            raise IsthmusError(
                f"{missing[0]}: {entry.name} has none, wanted {', '.join(missing)}, or a kind that has it, such as "
                f"{next(iter(KINDS))}"
            )
        device = SimulatedDevice(name=entry.name, **given)
    if entry.count == 1:
        return [device]
    return [replace(device, name=f"{entry.name}-{number}") for number in range(1, entry.count + 1)]
