"""Owns what a report says about the machine and the software it ran on, as plain JSON values."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil

_PACKAGES = ("isthmus", "torch", "transformers", "safetensors", "numpy")
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_PROC_BIND",
    "KMP_AFFINITY",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)


def environment() -> dict[str, object]:
    """Versions, processor, memory, commit, date and the variables that change speed; unknown things are None.

    Imports neither torch nor transformers; the GPU is named only if torch is imported already. Blocks for milliseconds
    (one ``git`` call in a checkout).
    """
    return {
        "versions": {package: _version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_name": cpu_name(),
        "num_cpus_usable": num_cpus_usable(),
        "num_cpus": psutil.cpu_count(logical=True),
        "num_cpu_cores": psutil.cpu_count(logical=False),
        "memory_bytes": memory_bytes(),
        "gpu_name": _gpu_name(),
        "git_commit": _git_commit(Path(__file__).resolve().parent),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def num_cpus_usable(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors this process may use at once: affinity, and the control group's quota rounded up; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _cpu_quota(cgroups))))


def memory_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory this process may use: the machine's, or the control group's limit where that is lower."""
    limits = [psutil.virtual_memory().total]
    for limit in (cgroups / "memory.max", cgroups / "memory" / "memory.limit_in_bytes"):
        text = _text(limit)
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def _cpu_quota(cgroups: Path) -> float:
    """Processors' worth of time per time that the control group grants; infinite without a limit (v2, then v1)."""
    quota, _, period = _text(cgroups / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(cgroups / "cpu" / "cpu.cfs_quota_us"), _text(cgroups / "cpu" / "cpu.cfs_period_us")
    # Without a limit v2 says "max" and v1 says "-1".
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else math.inf


def _text(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str | None:
    """The commit that ``folder`` is checked out from, with ``+changes`` when tracked files differ; None outside a
    checkout.

    An installed copy inside somebody else's checkout (a virtual environment in it) is not that checkout's: git must
    track it.
    """
    if _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit if not commit or not changes else f"{commit}+changes"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _gpu_name() -> str | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name()
