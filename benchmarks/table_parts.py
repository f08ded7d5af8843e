"""What tables of testbed runs are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def row_of(found: dict[str, Any], label: str) -> Row:
    return next(row for row in found["rows"] if row["label"] == label)


def median(row: Row) -> float:
    return row["latency_s"]["median"]


def name_of(plan: dict[str, Any]) -> str:
    ways = "+".join(dict.fromkeys(plan["originals"]))
    devices = len(plan["devices"])
    even = "" if len(set(plan["weights"])) == 1 else " uneven"
    overlapped = " overlapped" if plan.get("overlaps") else ""
    return f"{plan['strategy']} {ways}{overlapped} on {devices}{even}" if devices > 1 else plan["strategy"]


def with_spread(spread: dict[str, float], scale: float = 1.0, digits: int = 3) -> str:
    p10, p50, p90 = (f"{spread[name] * scale:.{digits}f}" for name in ("p10", "median", "p90"))
    return f"{p50} ({p10}–{p90})"


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]
