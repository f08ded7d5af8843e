"""Which core of the host each device stays on.

Where there is room, devices stay on one core each (see ``spec.pinning``): they get more of what was asked, and always
as much (``docs/log.md``, 2026-11-29).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from isthmus.spec.pinning import pin
from isthmus.spec.testbed import DeviceSpec

_CPUS = Path("/sys/devices/system/cpu")
_ROUNDING = 1e-9


def usable_cores(cpus: Path = _CPUS) -> list[int]:
    """Numbers of the processors that this process may run on, one of every physical core first."""
    return sorted(os.sched_getaffinity(0), key=lambda number: (_place_among_siblings(cpus, number), number))


def _place_among_siblings(cpus: Path, number: int) -> int:
    try:
        siblings = (cpus / f"cpu{number}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return 0
    return _numbers(siblings).index(number)


def _numbers(text: str) -> list[int]:
    """Of a list as the kernel writes it: ``0,4-6``."""
    ends = (part.partition("-") for part in text.strip().split(","))
    return [number for first, _, last in ends for number in range(int(first), int(last or first) + 1)]


def cores_for(devices: Sequence[DeviceSpec], taken: Mapping[int, float]) -> tuple[int, ...]:
    """A core for each of ``devices``, the largest first, each where least is taken; none if they do not all fit.
    ``taken``: the share of every core that others have, the cores to take first among equals first."""
    shares, cores = dict(taken), [0] * len(devices)
    for number in sorted(range(len(devices)), key=lambda number: -devices[number].cpu_share):
        core = min(shares, key=lambda core: shares[core])
        shares[core] += devices[number].cpu_share
        if shares[core] > 1 + _ROUNDING:
            return ()
        cores[number] = core
    return tuple(cores)


def keep_on(pids: Iterable[int], cores: Collection[int]) -> None:
    """Moves all threads of these processes to ``cores``. Those that have ended, or may not go there, stay away."""
    for pid in pids:
        with suppress(OSError):
            pin(cores, pid)
