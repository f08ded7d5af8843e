"""An emulated testbed: what was asked of its devices and links, and what was measured on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One weak device and its link, as asked for."""

    cpu_share: float
    """Cores' worth of CPU time: 0.45 is 45 % of one core, 2.0 two whole ones."""
    bandwidth_bits_per_s: float
    """Of the device's link, in either direction."""
    memory_bytes: int | None = None
    """None: not limited."""
    delay_s: float = 0.0
    """What every message that the device sends is held back, beside what the link itself takes."""


@dataclass(frozen=True, kw_only=True)
class TestbedSpec:
    """Devices on one switch. ``name`` keeps the testbeds of one host apart."""

    __test__ = False  # not a test, whatever pytest reads from the name

    name: str = "isthmus"
    devices: tuple[DeviceSpec, ...]
    subnet: str | None = None
    """``10.213.4.0/24``. None: the first one that is free."""
    cpu_quota_s: float = 0.001
    """How long a device of less than a core may compute before it must pause; 1 ms is the kernel's least. The shorter,
    the more like a slow CPU; but below its tick a kernel may give less than was asked for, see ``measured``."""


@dataclass(frozen=True, kw_only=True)
class DeviceMeasurement:
    """What one device and its link really do, measured with the others idle."""

    to_host_bits_per_s: float
    """Payload of one TCP connection over the device's link to the host."""
    from_host_bits_per_s: float
    round_trip_s: float
    """Median of 64-byte messages to the next device and back, over TCP; to the host where there is one device only."""
    cpu_share: float
    """CPU seconds a second that a process got which computes all the time on the device's threads."""
    gemm_flops: float
    """FP32 product of 512 × 512 matrices by PyTorch, floating-point operations per second, on the device's threads."""


@dataclass(frozen=True, kw_only=True)
class TestbedReport:
    """``--report`` of ``isthmus testbed up``. ``measured`` is in the devices' order, and empty when nothing was."""

    __test__ = False

    schema_version: int = 1
    kind: Literal["testbed"] = "testbed"
    asked: TestbedSpec
    measured: tuple[DeviceMeasurement, ...] = ()
