"""Hosts with accelerators as data sheets and measurements describe them, and a file that lists them: for simulated
fine-tuning."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.spec.errors import IsthmusError
from isthmus.spec.profile import Curve
from isthmus.spec.serialization import from_json

MAX_ACCELERATORS = 1024
DTYPES = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TuneAccelerator:
    """One accelerator and its link to its host."""

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    flops_per_s: dict[str, float]
    """Operations a second that large products reach, by dtype: not the peak."""
    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    copy_s: float = 1e-5
    """What starting one copy takes."""
    expert_s: float = 3e-5
    """What starting the kernels of one expert takes, in one pass of one micro-batch."""

    def __post_init__(self) -> None:
        _check_flops("accelerator.flops_per_s", self.flops_per_s)
        for name in ("memory_bytes", "memory_bytes_per_s", "h2d_bytes_per_s", "d2h_bytes_per_s"):
            _positive(f"accelerator.{name}", getattr(self, name))
        for name in ("copy_s", "expert_s"):
            _not_negative(f"accelerator.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class TuneHost:
    """``count`` equal hosts: processors with their memory, accelerators, and a network to other hosts. Each
    accelerator is driven by one process, and the host's cores and memory bandwidth are divided equally among them."""

    name: str
    count: int = 1
    accelerator: TuneAccelerator
    num_accelerators: int
    accelerators_per_root: int
    """That share one PCIe root: consecutive ones."""
    root_bytes_per_s: float
    """What a root passes in one direction, all its accelerators together."""
    num_cores: int
    core_flops_per_s: dict[str, float]
    """Operations a second that large products reach on one core, by dtype."""
    memory_bytes: int
    memory_bytes_per_s: float
    """All cores and copies together."""
    network_bytes_per_s: float
    """To other hosts, in one direction."""
    network_s: float = 5e-5
    """What one message takes besides its bytes."""

    def __post_init__(self) -> None:
        for name in ("count", "num_accelerators", "accelerators_per_root", "num_cores"):
            if getattr(self, name) < 1:
                raise IsthmusError(f"hosts.{name}: {self.name} has {getattr(self, name)}, wanted 1 or more")
        _check_flops("hosts.core_flops_per_s", self.core_flops_per_s)
        for name in ("root_bytes_per_s", "memory_bytes", "memory_bytes_per_s", "network_bytes_per_s"):
            _positive(f"hosts.{name}", getattr(self, name))
        _not_negative("hosts.network_s", self.network_s)
        if self.num_accelerators % self.accelerators_per_root:
            raise IsthmusError(
                f"hosts.accelerators_per_root: {self.name} has {self.accelerators_per_root} for "
                f"{self.num_accelerators} accelerators, wanted a divisor of them"
            )
        if self.num_cores < self.num_accelerators:
            raise IsthmusError(
                f"hosts.num_cores: {self.name} has {self.num_cores} for {self.num_accelerators} accelerators, wanted "
                "one for each process or more"
            )


@dataclass(frozen=True, kw_only=True)
class MeasuredExperts:
    """What was measured of experts of one shape; what is not measured follows from rates."""

    cpu_forward: Curve
    """Seconds of one expert on ``num_cores`` cores by its tokens."""
    num_cores: int
    load_s: float | None = None
    """Seconds to bring one expert to an accelerator that has its PCIe root for itself."""
    dense_load_s: float | None = None
    """Seconds to bring the rest of a layer, likewise."""

    def __post_init__(self) -> None:
        if self.num_cores < 1:
            raise IsthmusError(f"experts.num_cores: got {self.num_cores}, wanted 1 or more")
        if not self.cpu_forward.num_tokens or len(self.cpu_forward.num_tokens) != len(self.cpu_forward.seconds):
            raise IsthmusError(
                f"experts.cpu_forward: got {len(self.cpu_forward.num_tokens)} token counts and "
                f"{len(self.cpu_forward.seconds)} seconds, wanted as many of one as of the other, at least one"
            )
        for before, after in itertools.pairwise((0, *self.cpu_forward.num_tokens)):
            if after <= before:
                raise IsthmusError(
                    f"experts.cpu_forward.num_tokens: got {after} after {before}, wanted every one above the one before"
                )
        for name in ("load_s", "dense_load_s"):
            if (value := getattr(self, name)) is not None:
                _positive(f"experts.{name}", value)


@dataclass(frozen=True, kw_only=True)
class TuneCluster:
    """The file. Accelerators are numbered through the hosts in their order."""

    schema_version: int = 1
    name: str
    hosts: tuple[TuneHost, ...]
    experts: dict[str, MeasuredExperts] = field(default_factory=dict)
    """By ``Profile.expert_key``, such as ``h1024-i4096-mlp``."""
    source: str = ""
    """Where the figures are from."""

    def __post_init__(self) -> None:
        number = self.num_accelerators
        if not 1 <= number <= MAX_ACCELERATORS:
            raise IsthmusError(f"hosts: got {number} accelerators, wanted 1 to {MAX_ACCELERATORS} in all")

    @property
    def num_accelerators(self) -> int:
        return sum(host.count * host.num_accelerators for host in self.hosts)


def read_tune_cluster(path: Path) -> TuneCluster:
    """The cluster that the file describes. Raises ``IsthmusError`` that names the file and the field."""
    try:
        cluster = from_json(TuneCluster, path.read_text())
        for host in cluster.hosts:
            _check_path(host)
        return cluster
    except OSError as error:
        raise IsthmusError(
            f"cluster: cannot read {path}: {error.strerror or error}; wanted a JSON file or a known name"
        ) from error
    except ValueError as error:
        raise IsthmusError(f"cluster: {path}: {error}") from error


def _check_path(host: TuneHost) -> None:
    """A copy passes the accelerator's link, its root and the host's memory: what it reaches, all of them pass."""
    for way in ("h2d_bytes_per_s", "d2h_bytes_per_s"):
        rate = getattr(host.accelerator, way)
        for name in ("root_bytes_per_s", "memory_bytes_per_s"):
            if getattr(host, name) < rate:
                raise IsthmusError(
                    f"hosts.{name}: {host.name} has {getattr(host, name):g}, less than accelerator.{way}, {rate:g}, "
                    "whose copies pass it; lower that to what one accelerator alone reaches, or raise this"
                )


def _check_flops(field_name: str, rates: dict[str, float]) -> None:
    if not rates or set(rates) - set(DTYPES):
        raise IsthmusError(f"{field_name}: got {', '.join(rates) or 'none'}, wanted some of {', '.join(DTYPES)}")
    for dtype, rate in rates.items():
        _positive(f"{field_name}[{dtype!r}]", rate)


def _positive(field_name: str, value: float) -> None:
    if not value > 0:
        raise IsthmusError(f"{field_name}: got {value}, wanted more than 0")


def _not_negative(field_name: str, value: float) -> None:
    if value < 0:
        raise IsthmusError(f"{field_name}: got {value}, wanted 0 or more")
