"""What comes out of simulated fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from isthmus.spec.report import Spread
from isthmus.spec.tune_cluster import TuneCluster


@dataclass(frozen=True, kw_only=True)
class SimulateTuneRow:
    """One policy. Shares of time are means over accelerators (their lanes for copies and cores)."""

    policy: str
    step_s: Spread | None
    """Over steps, the first left out, which has no history of popularity. None: it does not fit, see ``note``."""
    sequences_per_s: float = 0.0
    num_stages: int = 0
    """All policies have the report's, but ours, which chooses."""
    bound_s: float = 0.0
    """What the busiest device needs if none of its resources ever pauses (no step that loads its weights is faster),
    times ``bubble_factor``. Of policies that wait for the norm of all gradients, as our runtime does (``affinity``), it
    is the bound of such steps."""
    bubble_factor: float = 1.0
    """What a pipeline's beginning and end add."""
    bound_share: float = 0.0
    accelerator_share: float = 0.0
    cpu_experts_share: float = 0.0
    h2d_share: float = 0.0
    d2h_share: float = 0.0
    optimizer_share: float = 0.0
    cpu_pairs_share: float = 0.0
    """Of all (token, expert) pairs those computed on CPUs."""
    h2d_bytes: int = 0
    """Of all accelerators in the last step."""
    d2h_bytes: int = 0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class SimulateTuneReport:
    """``report.json`` of ``isthmus simulate tune``. ``config`` holds plain JSON values."""

    schema_version: int = 1
    kind: Literal["simulate-tune"] = "simulate-tune"
    config: dict[str, object]
    cluster: TuneCluster
    num_stages: int
    skewness: float
    """G of the last step's counts."""
    rows: tuple[SimulateTuneRow, ...]
