"""What ran where and when, measured or predicted: one format for both."""

from __future__ import annotations

from dataclasses import dataclass

LANES = ("accelerator", "cpu_experts", "h2d", "d2h", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Span:
    """Something that kept ``lane`` (one of ``LANES``) busy from ``start_s`` to ``end_s``, seconds since the timeline's
    origin."""

    lane: str
    name: str
    start_s: float
    end_s: float
    kind: str = ""
    """What colour it gets: ``attention``, ``expert_forward``, ``expert_backward``, ``load_expert``, ``gradient``,
    ``tokens``, ``wait``, …"""
    num_bytes: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Timeline:
    schema_version: int = 1
    spans: tuple[Span, ...]
    steps: tuple[tuple[int, float, float], ...] = ()
    """(step, start_s, end_s)"""
