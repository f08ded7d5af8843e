"""How people ask for devices: ``cpu=0.2,bandwidth=60mbit`` to ``DeviceSpec``, and what can be asked for. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from isthmus.spec.errors import IsthmusError
from isthmus.spec.testbed import DeviceSpec, TestbedSpec
from isthmus.spec.units import parse_bits_per_s, parse_bytes, parse_seconds

MAX_DEVICES = 200
KEYS = ("cpu", "bandwidth", "memory", "delay")
# With "-199" behind it a name must fit the 15 characters of a network interface's.
_NAME = re.compile(r"[a-z][a-z0-9]{0,9}")
# The kernel's shortest CPU quota is a millisecond, its longest period a second.
_LEAST_QUOTA_S = 0.001
_LONGEST_QUOTA_S = 0.1
_LONGEST_PERIOD_S = 1.0


def parse_device(text: str, defaults: dict[str, str], field: str) -> DeviceSpec:
    """The device of ``cpu=0.2,bandwidth=60mbit,memory=1GiB,delay=1ms``; what it leaves out is taken from ``defaults``,
    written likewise by key.

    Raises ``IsthmusError`` naming ``field`` and the part that is unknown, written twice, malformed or missing.
    """
    own: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in KEYS:
            raise IsthmusError(
                f"{field}: got {part!r}, wanted cpu=CORES, bandwidth=RATE, memory=SIZE or delay=DURATION, "
                "such as cpu=0.2,bandwidth=60mbit,memory=1GiB"
            )
        if key in own:
            raise IsthmusError(f"{field}: {key} is there twice in {text!r}; say it once")
        own[key] = value
    values = defaults | own
    if missing := [key for key in ("cpu", "bandwidth") if key not in values]:
        raise IsthmusError(
            f"{field}: got no {' and no '.join(missing)}; give every device both, with "
            "--device cpu=0.2,bandwidth=60mbit or with --cpu and --bandwidth"
        )
    return DeviceSpec(
        cpu_share=parse_cpu(values["cpu"], f"{field}: cpu"),
        bandwidth_bits_per_s=parse_bits_per_s(values["bandwidth"], f"{field}: bandwidth"),
        memory_bytes=parse_bytes(values["memory"], f"{field}: memory") if "memory" in values else None,
        delay_s=parse_seconds(values.get("delay", "0"), f"{field}: delay"),
    )


def parse_devices(count: int | None, devices: Sequence[str], defaults: dict[str, str]) -> tuple[DeviceSpec, ...]:
    """``count`` equal devices as ``defaults`` have them, or one for each text of ``devices`` (see ``parse_device``).

    Raises ``IsthmusError`` when neither or both are given, or one of them is malformed.
    """
    if count is not None and devices:
        raise IsthmusError("devices: got --devices and --device; wanted one of them: --device once for every device")
    if count is not None:
        return (parse_device("", defaults, "devices"),) * count
    if not devices:
        raise IsthmusError("devices: got none; wanted --devices 4, or --device cpu=0.2,bandwidth=60mbit once for each")
    return tuple(parse_device(text, defaults, f"device {number}") for number, text in enumerate(devices))


def parse_cpu(text: str, field: str = "cpu") -> float:
    """Cores' worth of CPU time in ``0.45``. Raises ``IsthmusError`` naming ``field`` when it is none."""
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text.strip()):
        raise IsthmusError(f"{field}: got {text!r}, wanted a number of cores such as 0.45 or 2")
    return float(text)


def parse_device_numbers(text: str) -> tuple[int, ...]:
    """Device numbers of ``0,2``, in that order. Raises ``IsthmusError`` when it is anything else."""
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(piece.isascii() and piece.isdigit() for piece in pieces):
        raise IsthmusError(f"device: got {text!r}, wanted numbers of devices such as 0,2")
    return tuple(int(piece) for piece in pieces)


def check_spec(spec: TestbedSpec, num_cores: int) -> None:
    """Raises ``IsthmusError`` naming what of ``spec`` cannot be emulated on a host with ``num_cores`` cores."""
    check_name(spec.name)
    if not _LEAST_QUOTA_S <= spec.cpu_quota_s <= _LONGEST_QUOTA_S:
        raise IsthmusError(f"quota: got {spec.cpu_quota_s:g} s, wanted 1ms to 100ms")
    if not 1 <= len(spec.devices) <= MAX_DEVICES:
        raise IsthmusError(f"devices: got {len(spec.devices)}, wanted 1 to {MAX_DEVICES}")
    for number, device in enumerate(spec.devices):
        check_device(spec, device, num_cores, f"device {number}")


def check_name(name: str) -> None:
    """Raises ``IsthmusError`` unless ``name`` can begin the names of network interfaces."""
    if not _NAME.fullmatch(name):
        raise IsthmusError(
            f"name: got {name!r}, wanted a small letter and at most 9 more small letters and digits, such as isthmus"
        )


def check_device(spec: TestbedSpec, device: DeviceSpec, num_cores: int, field: str) -> None:
    """Raises ``IsthmusError`` naming ``field`` when a host with ``num_cores`` cores cannot emulate ``device``."""
    least_share = spec.cpu_quota_s / _LONGEST_PERIOD_S
    if not least_share <= device.cpu_share <= num_cores:
        raise IsthmusError(
            f"{field}: cpu: got {device.cpu_share:g}, wanted {least_share:g} (with quotas of "
            f"{spec.cpu_quota_s * 1e3:g} ms) to {num_cores} (the cores of this host)"
        )
    if not 1e3 <= device.bandwidth_bits_per_s <= 1e12:
        raise IsthmusError(
            f"{field}: bandwidth: got {device.bandwidth_bits_per_s:g} bit/s, wanted 1kbit to 1000gbit, such as 125mbit"
        )
    if device.memory_bytes is not None and device.memory_bytes <= 0:
        raise IsthmusError(f"{field}: memory: got {device.memory_bytes}, wanted more than 0 bytes, such as 1GiB")
    if not 0 <= device.delay_s <= 10:
        raise IsthmusError(f"{field}: delay: got {device.delay_s:g} s, wanted 0 s to 10 s, such as 1ms")
