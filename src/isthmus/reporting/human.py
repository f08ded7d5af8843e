"""Owns how sizes and durations are written for people in progress, tables and pictures."""

from __future__ import annotations


def human_bytes(num_bytes: float) -> str:
    """``1.25 GB``: three significant digits in powers of 1000."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(num_bytes) >= factor * 0.9995:
            return f"{_three_digits(num_bytes / factor)} {unit}"
    return f"{num_bytes:.0f} B"


def human_memory(num_bytes: float) -> str:
    """``7.08 GiB``: as above in powers of 1024, as memory is sold and budgets are given."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= factor:
            return f"{_three_digits(num_bytes / factor)} {unit}"
    return f"{num_bytes:.0f} B"


def human_s(seconds: float) -> str:
    """``1 h 05 min``, ``2 min 05 s``, ``1.32 s``, ``12.4 ms`` or ``85 µs``."""
    if seconds >= 3599.5:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if seconds >= 99.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    if seconds >= 0.9995:
        return f"{_three_digits(seconds)} s"
    if seconds >= 0.9995e-3:
        return f"{_three_digits(seconds * 1e3)} ms"
    return f"{seconds * 1e6:.0f} µs"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"
