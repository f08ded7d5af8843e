"""What comes out of ``isthmus plan tune``: does it fit, how long does a step take, and what would help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from isthmus.spec.tune_cluster import TuneCluster


@dataclass(frozen=True, kw_only=True)
class DeviceNeed:
    """Memory of one accelerator. Its slots take what the rest leaves, so ``total_bytes`` says little of what it needs:
    ``minimum_bytes`` does."""

    device: int
    host: int
    num_layers: int
    num_stages: int
    memory_bytes: int
    dense_bytes: int
    """Weights and gradients of all that is no routed expert."""
    is_dense_resident: bool
    """Or the layers pass through a few buffers."""
    activation_bytes: int
    slot_bytes: int
    """Of one expert."""
    num_slots: int
    num_experts: int
    """Of its layers."""
    total_bytes: int
    minimum_bytes: int

    @property
    def short_bytes(self) -> int:
        return max(0, self.minimum_bytes - self.memory_bytes)


@dataclass(frozen=True, kw_only=True)
class HostNeed:
    """Memory of one host: what its accelerators' layers need by kind, ``staging`` the tokens' buffers."""

    host: int
    name: str
    memory_bytes: int
    kinds_bytes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.kinds_bytes.values())

    @property
    def short_bytes(self) -> int:
        return max(0, self.total_bytes - self.memory_bytes)


@dataclass(frozen=True, kw_only=True)
class LinkUse:
    """What passes a link in one step. ``there_bytes``: to accelerators, or out of a host; ``back_bytes``: the other
    way."""

    name: str
    there_bytes: int
    back_bytes: int
    there_bytes_per_s: float
    back_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class PredictedStep:
    """A step as simulated."""

    step_s: float
    tokens_per_s: float
    num_stages: int
    bound_s: float
    """With the pipeline's bubble factor."""
    bound_share: float
    busy_shares: dict[str, float]
    """Of the step, means over accelerators, by resource."""
    cpu_pairs_share: float
    """Of all (token, expert) pairs those computed on CPUs."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something else than was asked for, predicted in the same way."""

    change: str
    resource: str = ""
    """What there would be more of; empty where the same hardware is used otherwise."""
    fits: bool
    tokens_per_s: float | None
    gain: float | None
    """Times as many tokens a second; None where either cannot be predicted."""


@dataclass(frozen=True, kw_only=True)
class PlanTuneReport:
    """``report.json`` of ``isthmus plan tune``. ``config`` holds plain JSON values."""

    schema_version: int = 1
    kind: Literal["plan-tune"] = "plan-tune"
    config: dict[str, object]
    cluster: TuneCluster
    num_parameters: int
    skewness: float | None
    fits: bool
    devices: tuple[DeviceNeed, ...]
    hosts: tuple[HostNeed, ...]
    links: tuple[LinkUse, ...]
    step: PredictedStep | None
    limiting: str
    """The resource of which more would help most, if changes were predicted; else the one that is busy longest."""
    reason: str
    """Why there is no step, if there is none."""
    changes: tuple[Change, ...]
    micro_batches_in_flight: int | None = None
    """Of a step's: so many go forward and backward before the next begin. None: written before that was known."""
