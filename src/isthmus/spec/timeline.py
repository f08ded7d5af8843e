"""What ran where and when, measured or predicted: one format for both."""

from __future__ import annotations

import re
from dataclasses import dataclass

LANES = ("accelerator", "cpu_experts", "h2d", "d2h", "optimizer")
_LAYER = re.compile(r"\bL(\d+)\b")


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

    @property
    def layer(self) -> int | None:
        """The first of those that its ``name`` has, as in ``load L3 E5``; None: it is of none."""
        found = _LAYER.search(self.name)
        return int(found[1]) if found else None


@dataclass(frozen=True, kw_only=True)
class Timeline:
    schema_version: int = 1
    spans: tuple[Span, ...]
    steps: tuple[tuple[int, float, float], ...] = ()
    """(step, start_s, end_s)"""
