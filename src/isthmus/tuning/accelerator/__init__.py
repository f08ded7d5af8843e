"""Makes the accelerator that was asked for: ``cuda``, ``emulated``, ``host``, or what fits this machine."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch

from isthmus.reporting.recorder import Recorder
from isthmus.spec.errors import IsthmusError
from isthmus.tuning.accelerator.base import Accelerator
from isthmus.tuning.accelerator.cuda import CudaAccelerator
from isthmus.tuning.accelerator.emulated import EmulatedAccelerator
from isthmus.tuning.accelerator.host import HostAccelerator

KINDS = ("auto", "cuda", "emulated", "host")
_DEFAULT_SHARE = 0.9
"""Of the GPU memory that is free; the rest is for the CUDA context's growth and the allocator's rounding."""


def create(
    kind: str,
    *,
    budget_bytes: int | None,
    recorder: Recorder,
    h2d_bytes_per_s: float | None = None,
    d2h_bytes_per_s: float | None = None,
    latency_s: float | None = None,
    copy_delay: Callable[[], float] | None = None,
) -> Accelerator:
    """The accelerator of ``kind``; ``auto``: ``emulated`` if a link is given, else ``cuda`` if present, else ``host``.

    ``budget_bytes`` None: most of the GPU's free memory, or the host's memory. Rates and latency are for ``emulated``
    only, which needs both rates and a budget. Raises ``IsthmusError`` for anything else.
    """
    if kind not in KINDS:
        raise IsthmusError(f"accelerator: got {kind!r}, wanted one of {', '.join(KINDS)}.")
    link = {"h2d_bytes_per_s": h2d_bytes_per_s, "d2h_bytes_per_s": d2h_bytes_per_s, "latency_s": latency_s}
    given = [field for field, value in link.items() if value is not None]
    if kind == "auto":
        kind = "emulated" if given else "cuda" if torch.cuda.is_available() else "host"
    if kind == "emulated":
        if h2d_bytes_per_s is None or d2h_bytes_per_s is None:
            missing = "h2d_bytes_per_s" if h2d_bytes_per_s is None else "d2h_bytes_per_s"
            raise IsthmusError(
                f"{missing}: got nothing, wanted the emulated link's rate: say --emulate h2d=2GB/s,d2h=2GB/s."
            )
        if budget_bytes is None:
            raise IsthmusError(
                "budget_bytes: got nothing, wanted the emulated memory's size: say --accelerator-memory 8GiB."
            )
        return EmulatedAccelerator(
            budget_bytes=budget_bytes,
            recorder=recorder,
            h2d_bytes_per_s=h2d_bytes_per_s,
            d2h_bytes_per_s=d2h_bytes_per_s,
            latency_s=latency_s or 0.0,
            copy_delay=copy_delay,
        )
    if given:
        raise IsthmusError(
            f"{given[0]}: got a value with accelerator {kind!r}, wanted none: only 'emulated' has a link to set."
        )
    if kind == "host":
        return HostAccelerator(budget_bytes=budget_bytes or psutil.virtual_memory().total, recorder=recorder)
    if not torch.cuda.is_available():
        raise IsthmusError(
            "accelerator: got 'cuda', but PyTorch finds no CUDA device here: install a CUDA build of torch and "
            "the driver, check CUDA_VISIBLE_DEVICES, or say --accelerator host (or emulated)."
        )
    free_bytes, _ = torch.cuda.mem_get_info()
    return CudaAccelerator(budget_bytes=budget_bytes or int(_DEFAULT_SHARE * free_bytes), recorder=recorder)
