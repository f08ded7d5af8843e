"""What a machine is: host, accelerator, and the links between them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LinkRate:
    """Copy rates between host and accelerator memory. ``None``: there is no separate memory, nothing is copied."""

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    latency_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One host with one accelerator."""

    cpu_name: str
    num_cpu_threads: int
    host_memory_bytes: int
    accelerator: str
    """``cuda``, ``emulated`` or ``host``."""
    accelerator_name: str
    accelerator_memory_bytes: int
    link: LinkRate | None = None
    cpu_speed: float = 1.0
    """Fraction of this host's speed at which CPU experts run (below 1 only when fewer cores are emulated)."""
