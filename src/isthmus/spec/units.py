"""How people write sizes, rates and lists, and nothing else: ``8GiB``, ``2GB/s``, ``125mbit``, ``20us``, ``a,b``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TypedDict, TypeVar

from isthmus.spec.errors import IsthmusError

Number = TypeVar("Number", int, float)

_BYTE_FACTORS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
_BIT_FACTORS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_SECOND_FACTORS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)\s*([A-Za-zµ/]*)\s*")


class Emulation(TypedDict, total=False):
    """The slower machine that ``--emulate`` asks for. A key that was not written is absent: the machine's own stays."""

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    latency_s: float
    num_threads: int


def parse_bytes(value: str | int, field: str = "size") -> int:
    """Bytes of ``8GiB`` (powers of 1024), ``8GB`` (powers of 1000) or a plain number of bytes; case does not matter.

    Raises ``IsthmusError`` naming ``field`` when ``value`` is not such a size or not above zero.
    """
    if isinstance(value, int):
        num_bytes = value
    else:
        num_bytes = int(_quantity(value, _BYTE_FACTORS, field, "a size such as 8GiB, 512MiB or 2GB"))
    if num_bytes <= 0:
        raise IsthmusError(f"{field}: got {value!r}, wanted more than 0 bytes, such as 8GiB")
    return num_bytes


def parse_rate(value: str | float, field: str = "rate") -> float:
    """Bytes per second of ``2GB/s``, ``800MiB/s`` or a plain number of bytes per second.

    Raises ``IsthmusError`` naming ``field`` when ``value`` is not such a rate or not above zero.
    """
    if isinstance(value, str):
        factors = {f"{unit}/s" if unit else "": factor for unit, factor in _BYTE_FACTORS.items()}
        bytes_per_s = _quantity(value, factors, field, "a rate such as 2GB/s or 800MiB/s")
    else:
        bytes_per_s = float(value)
    if not (bytes_per_s > 0 and math.isfinite(bytes_per_s)):
        raise IsthmusError(f"{field}: got {value!r}, wanted more than 0 bytes per second, such as 2GB/s")
    return bytes_per_s


def parse_bits_per_s(value: str, field: str = "bandwidth") -> float:
    """Bits per second of ``125mbit`` or ``1gbit``, as ``tc`` writes them (powers of 1000); case does not matter.

    Raises ``IsthmusError`` naming ``field`` when ``value`` is not such a rate or not above zero.
    """
    bits_per_s = _quantity(value, _BIT_FACTORS, field, "bits per second such as 125mbit or 1gbit")
    if not (bits_per_s > 0 and math.isfinite(bits_per_s)):
        raise IsthmusError(f"{field}: got {value!r}, wanted more than 0 bits per second, such as 125mbit")
    return bits_per_s


def parse_seconds(value: str, field: str = "duration") -> float:
    """Seconds of ``20us``, ``1.5ms`` or ``2s``; only ``0`` needs no unit. Raises ``IsthmusError`` naming ``field``."""
    if value.strip() == "0":
        return 0.0
    return _quantity(value, _SECOND_FACTORS, field, "a duration such as 20us, 1.5ms or 2s")


def parse_emulate(text: str) -> Emulation:
    """The parts of ``h2d=2GB/s,d2h=2GB/s,latency=20us,threads=1``, each at most once, in any order, any left out.

    Raises ``IsthmusError`` naming the part that is unknown, written twice or malformed.
    """
    emulation: Emulation = {}
    seen: set[str] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in ("h2d", "d2h", "latency", "threads"):
            raise IsthmusError(
                f"emulate: got {part!r}, wanted h2d=RATE, d2h=RATE, latency=DURATION or threads=N, "
                "such as h2d=2GB/s,d2h=2GB/s,latency=20us,threads=1"
            )
        if key in seen:
            raise IsthmusError(f"emulate: {key} is there twice in {text!r}; say it once")
        seen.add(key)
        if key == "h2d":
            emulation["h2d_bytes_per_s"] = parse_rate(value, "emulate h2d")
        elif key == "d2h":
            emulation["d2h_bytes_per_s"] = parse_rate(value, "emulate d2h")
        elif key == "latency":
            emulation["latency_s"] = parse_seconds(value, "emulate latency")
        else:
            emulation["num_threads"] = _parse_count(value, "emulate threads")
    return emulation


def _parse_count(value: str, field: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) == 0:
        raise IsthmusError(f"{field}: got {value!r}, wanted a whole number of 1 or more")
    return int(value)


def _quantity(value: str, factors: dict[str, int] | dict[str, float], field: str, wanted: str) -> float:
    match = _QUANTITY.fullmatch(value)
    by_lower_case = {unit.lower(): factor for unit, factor in factors.items()}
    if match is None or match[2].lower() not in by_lower_case:
        units = ", ".join(unit for unit in factors if unit)
        raise IsthmusError(f"{field}: got {value!r}, wanted {wanted} (units: {units})")
    return float(match[1]) * by_lower_case[match[2].lower()]


def parse_numbers(field: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Numbers with commas between. Raises ``IsthmusError`` that names ``field`` for anything else."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise IsthmusError(f"{field}: got {text!r}, wanted numbers with commas between, such as 2,5") from None


def parse_names(field: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names in ``a,b`` or all of ``known`` for ``all``. Raises ``IsthmusError`` that names the unknown one."""
    if text == "all":
        return tuple(known)
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if unknown := [name for name in names if name not in known]:
        raise IsthmusError(f"{field}: got {', '.join(unknown)}, wanted all or some of {', '.join(known)}")
    if not names:
        raise IsthmusError(f"{field}: got none, wanted all or some of {', '.join(known)}")
    return names
