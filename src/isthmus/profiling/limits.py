"""What this process may use: the limits of its control group and of those above it, versions 1 and 2; and the caches
of its processors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


def free_memory_bytes(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Bytes that this process can still take: what the machine has available, or less where a group is limited.

    Pages of files that were read count as free: the kernel gives them up.
    """
    return free_memory(root, own)[0]


def free_memory(root: Path = _ROOT, own: Path = _OWN) -> tuple[int, str]:
    """(``free_memory_bytes``, the group whose limit that is, empty: the machine's). Processes of one host and one group
    take from the same."""
    free = [(psutil.virtual_memory().available, "")]
    for limit, usage, statistics, file_pages in (
        ("memory.max", "memory.current", "memory.stat", "file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_cache"),
    ):
        for group in _groups("memory", root, own):
            most, used = _number(group / limit), _number(group / usage)
            if most is not None and used is not None:
                free.append((most - used + _statistic(group / statistics, file_pages), str(group)))
    num_bytes, group = min(free)
    return max(0, num_bytes), group


def cpu_quota(root: Path = _ROOT, own: Path = _OWN) -> tuple[int, int] | None:
    """(quota, period) in microseconds of the tightest group; None without a limit."""
    found: list[tuple[int, int]] = []
    for group in _groups("cpu", root, own):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            found.append((int(quota), int(period)))
    return min(found, key=lambda pair: pair[0] / pair[1], default=None)


def last_level_cache_bytes(cpus: Path = _CPUS) -> int:
    """Of all caches of the highest level that this process's processors have; 0 where the system does not tell."""
    caches: dict[tuple[int, str], int] = {}
    for cpu in os.sched_getaffinity(0):
        for cache in (cpus / f"cpu{cpu}" / "cache").glob("index*"):
            level, size = _number(cache / "level"), _text(cache / "size")
            if level is not None and size.endswith("K") and size[:-1].isdigit():
                caches[level, _text(cache / "shared_cpu_list")] = int(size[:-1]) << 10
    highest = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == highest)


def _groups(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """The directories of this process's group and those above it, where they are mounted."""
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mounted = root / controller if controllers else root
        group = mounted / path.lstrip("/")
        while group.is_relative_to(mounted):
            if group.is_dir():
                yield group
            group = group.parent


def _statistic(path: Path, name: str) -> int:
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
