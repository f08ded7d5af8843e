"""Devices that are simulated: what data sheets and benchmarks say of them, a file that lists them, what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from isthmus.spec.cluster import MAX_DEVICES
from isthmus.spec.errors import IsthmusError
from isthmus.spec.inference import DTYPES
from isthmus.spec.report import BenchInferRow


@dataclass(frozen=True, kw_only=True)
class SimulatedDevice:
    """One device and its link. Raises ``IsthmusError`` for rates that no device has."""

    name: str
    flops_per_s: dict[str, float]
    """Operations a second that large products reach, by dtype of the weights: not the processor's peak."""
    memory_bytes_per_s: float
    """Read from memory by all cores together."""
    memory_bytes: int
    """Built in, that of the system included."""
    bits_per_s: float
    """Of the link, in either direction."""
    round_trip_s: float
    """Of the smallest message to another device and back."""
    operator_s: float = 1.5e-5
    """What starting one operator of the framework takes."""
    is_wireless: bool = False
    """All such devices share one medium of ``bits_per_s``, and each byte between two of them passes it twice."""

    def __post_init__(self) -> None:
        if not self.flops_per_s or set(self.flops_per_s) - set(DTYPES):
            got = ", ".join(self.flops_per_s) or "none"
            raise IsthmusError(f"flops_per_s: {self.name} has {got}, wanted some of {', '.join(DTYPES)}")
        rates = {f"flops_per_s[{dtype!r}]": rate for dtype, rate in self.flops_per_s.items()}
        for field in ("memory_bytes_per_s", "memory_bytes", "bits_per_s"):
            rates[field] = getattr(self, field)
        for field, value in rates.items():
            if value <= 0:
                raise IsthmusError(f"{field}: {self.name} has {value}, wanted more than 0")
        for field in ("round_trip_s", "operator_s"):
            if getattr(self, field) < 0:
                raise IsthmusError(f"{field}: {self.name} has {getattr(self, field)}, wanted 0 or more")


@dataclass(frozen=True, kw_only=True)
class DeviceEntry:
    """``count`` devices of a file. What is left out is that of ``kind``, a device that isthmus knows by name."""

    name: str
    count: int = 1
    """More than 1: ``name-1``, ``name-2``, …"""
    kind: str | None = None
    flops_per_s: dict[str, float] | None = None
    memory_bytes_per_s: float | None = None
    memory_bytes: int | None = None
    bits_per_s: float | None = None
    round_trip_s: float | None = None
    operator_s: float | None = None
    is_wireless: bool | None = None


@dataclass(frozen=True, kw_only=True)
class SimulatedCluster:
    """The file. The first device leads."""

    schema_version: int = 1
    devices: tuple[DeviceEntry, ...]

    def __post_init__(self) -> None:
        for entry in self.devices:
            if entry.count < 1:
                raise IsthmusError(f"count: {entry.name} has {entry.count}, wanted 1 or more")
        check_number(sum(entry.count for entry in self.devices))


def check_number(num_devices: int) -> None:
    """Raises ``IsthmusError`` for fewer or more devices than can work together."""
    if not 1 <= num_devices <= MAX_DEVICES:
        raise IsthmusError(f"devices: got {num_devices}, wanted 1 to {MAX_DEVICES}")


@dataclass(frozen=True, kw_only=True)
class SimulatedCell:
    """Ways of answering a request at one bandwidth. In ``rows`` ``latency_s`` is what was simulated."""

    bits_per_s: float | None
    """Of every link. None: each device's own."""
    rows: tuple[BenchInferRow, ...]


@dataclass(frozen=True, kw_only=True)
class SimulateInferReport:
    """``report.json`` of ``isthmus simulate infer``. ``config`` holds plain JSON values."""

    schema_version: int = 1
    kind: Literal["simulate-infer"] = "simulate-infer"
    config: dict[str, object]
    devices: tuple[SimulatedDevice, ...]
    cells: tuple[SimulatedCell, ...]


@dataclass(frozen=True, kw_only=True)
class PublishedFigure:
    """One latency of the published table, by that of one device, and the same simulated."""

    model: str
    bits_per_s: float
    strategy: str
    published: float
    simulated: float

    @property
    def deviation(self) -> float:
        """Simulated by published, less 1."""
        return self.simulated / self.published - 1


@dataclass(frozen=True, kw_only=True)
class OwnFigure:
    """What our own plans take on the same devices, by one device's latency for the original."""

    model: str
    bits_per_s: float
    codec: str
    plan: str
    latency_s: float
    one_device_s: float


@dataclass(frozen=True, kw_only=True)
class PublishedReport:
    """``report.json`` of ``isthmus simulate infer --published``."""

    schema_version: int = 1
    kind: Literal["simulate-published"] = "simulate-published"
    device: SimulatedDevice
    figures: tuple[PublishedFigure, ...]
    ours: tuple[OwnFigure, ...]
