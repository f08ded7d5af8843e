"""Which devices there are (``cluster.json``), and what was measured of them and of their links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from isthmus.spec.errors import IsthmusError
from isthmus.spec.profile import Curve
from isthmus.spec.serialization import from_json

MAX_DEVICES = 64
"""So many at most work on one request."""


@dataclass(frozen=True, kw_only=True)
class ClusterDevice:
    """One device as its owner describes it."""

    name: str
    address: str
    memory_bytes: int | None = None
    """The most that isthmus may take there, its process included. None: what is free."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices that can work together, the leader first. Raises ``IsthmusError`` for what cannot be a cluster."""

    schema_version: int = 1
    devices: tuple[ClusterDevice, ...]
    leader: str | None = None
    """The device that is asked and answers. None: the first."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.devices) <= MAX_DEVICES:
            raise IsthmusError(f"devices: got {len(self.devices)}, wanted 1 to {MAX_DEVICES}")
        for what in ("name", "address"):
            seen: set[str] = set()
            for device in self.devices:
                value = getattr(device, what)
                if not value or value != value.strip():
                    raise IsthmusError(f"devices: got {what} {value!r}, wanted some, without spaces around it")
                if value in seen:
                    raise IsthmusError(f"devices: {what} {value!r} is there twice, wanted each device once")
                seen.add(value)
        for device in self.devices:
            if device.memory_bytes is not None and device.memory_bytes <= 0:
                raise IsthmusError(
                    f"devices: {device.name} has memory_bytes {device.memory_bytes}, wanted more than 0, or none"
                )
        if self.leader is not None:
            self.device(self.leader)

    def device(self, name: str) -> ClusterDevice:
        """Raises ``IsthmusError`` for a name that no device has."""
        for device in self.devices:
            if device.name == name:
                return device
        known = ", ".join(device.name for device in self.devices)
        raise IsthmusError(f"devices: no device is called {name!r}, wanted one of {known}")

    def select(self, names: Sequence[str] | None = None) -> Cluster:
        """The cluster of ``names`` only (None: of all), its leader first, the others in the file's order."""
        chosen = [device.name for device in self.devices] if names is None else list(names)
        wanted = {self.device(name).name for name in chosen}
        if len(wanted) < len(chosen):
            raise IsthmusError(f"devices: got {', '.join(chosen)}, wanted each device once")
        leader = self.leader if self.leader in wanted else None
        devices = [device for device in self.devices if device.name in wanted]
        devices.sort(key=lambda device: device.name != leader)
        return replace(self, devices=tuple(devices), leader=leader)


def read_cluster(path: Path) -> Cluster:
    """The cluster that the file describes. Raises ``IsthmusError`` that names the file and what is wrong in it."""
    try:
        return from_json(Cluster, path.read_text())
    except OSError as error:
        raise IsthmusError(f"cluster: cannot read {path}: {error.strerror or error}; wanted a JSON file") from error
    except ValueError as error:
        raise IsthmusError(f"cluster: {path}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class WidthTimes:
    """Seconds of the two blocks of one layer, of which a device has ``share`` of the heads and columns.

    By rows (tokens of all sequences), norms and residuals included, but not ``s_per_score`` for every score.
    """

    share: float
    attention: Curve
    mlp: Curve


@dataclass(frozen=True, kw_only=True)
class CodecTimes:
    """Seconds per value of 32 bits. For ``fp32``, which needs no encoding, both are 0."""

    encode_s: float
    decode_s: float


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What one device needs for the parts of one model, measured while the others computed too."""

    name: str
    cpu_name: str
    num_threads: int
    free_memory_bytes: int
    """For weights and all else that is not there yet; within the limit of the device's control group."""
    memory_bytes_per_s: float
    """Read from memory, one stream per thread."""
    layers: dict[str, tuple[WidthTimes, ...]]
    """By dtype; widest first."""
    sub_block: dict[str, WidthTimes] = field(default_factory=dict)
    """By dtype, of a decoupled model: its first sub-block, of which ``share`` is the part of the hidden units. Where
    there is none it is derived from ``layers``."""
    embedding: Curve
    """Seconds before the first layer, by rows."""
    s_per_score: float
    """Seconds of attention per query, key and head."""
    codecs: dict[str, CodecTimes]
    s_per_added_value: float
    """Adding up what came, or copying it together."""
    alone_factor: float = 1.0
    """Seconds of the same work when no other device computes, as a part of those above: below 1 where devices share a
    processor, as on an emulated testbed."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Seconds that bytes add to an exchange, after a pause. ``num_bytes`` rises, ``seconds`` never falls."""

    num_bytes: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Seconds for the last device, which is not always the same, beside the mean of computing, by the seconds that all
    have computed: under a quota longer computing meets more pauses, and not at the same time on all."""

    computing_s: tuple[float, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Overlapping:
    """What it costs that a device computes while an exchange goes on. ``starting_s``: seconds by which the smallest
    exchange takes longer on a thread of its own. ``s_per_byte``: seconds by which computing takes longer for every byte
    (of the busier direction) that goes out and comes in meanwhile."""

    starting_s: float
    s_per_byte: float


@dataclass(frozen=True, kw_only=True)
class LinkProfile:
    """One device's link, measured with the real transport.

    An exchange in which the device sends (and receives) S bytes in M messages takes ``latency_s`` + M · ``message_s`` +
    ``transfer`` at S; ``waiting`` more where all have computed before it; and at ``bytes_per_s`` what is missing of
    ``burst_bytes``, or of S where that is less.
    """

    round_trip_s: float
    """Of the smallest message, there and back, with nothing else to do: half of it is the bound's latency."""
    latency_s: float
    message_s: float
    waiting: Waiting
    sum_step_s: float
    """All that an exchange of a repeated sum takes after a token's computing, waiting included; 0 for encoders."""
    transfer: Transfer
    bytes_per_s: float
    """For long."""
    burst_bytes: float = 0.0
    """So much is let through at once after a pause (token buckets, buffers of switches)."""
    overlapping: Overlapping | None = None
    """None: not measured, and nothing is computed while an exchange between layers goes on."""
    airtime_s_per_byte: float = 0.0
    """On a medium that links share (Wi-Fi): seconds for which each byte sent or received occupies it. What all devices
    send and receive in an exchange then takes at least the sum."""


@dataclass(frozen=True, kw_only=True)
class ClusterProfile:
    """Devices and their links, in the order of ranks."""

    schema_version: int = 1
    transport: str
    model: str
    """What it was measured with."""
    devices: tuple[DeviceProfile, ...]
    links: tuple[LinkProfile, ...]
    measured_at: str = ""
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.devices or len(self.devices) != len(self.links):
            raise IsthmusError(
                f"profile: got {len(self.devices)} devices and {len(self.links)} links, wanted as many of both, "
                "at least one; measure it again"
            )
