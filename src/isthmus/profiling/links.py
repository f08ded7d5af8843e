"""Seconds per byte between host and accelerator memory, alone and with both directions busy, and the copies it takes to
keep an engine busy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Copier(Protocol):
    """What is measured: the copying side of an accelerator."""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...

    def free(self, tensor: Tensor) -> None: ...

    def allocate_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...

    def copy(self, destination: Tensor, source: Tensor, direction: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class LinkTimes:
    h2d_s_per_byte: float
    d2h_s_per_byte: float
    h2d_duplex_s_per_byte: float
    d2h_duplex_s_per_byte: float
    latency_s: float
    window: int

    @classmethod
    def free(cls) -> LinkTimes:
        """Where there is no link, nothing travels."""
        return cls(
            h2d_s_per_byte=0.0,
            d2h_s_per_byte=0.0,
            h2d_duplex_s_per_byte=0.0,
            d2h_duplex_s_per_byte=0.0,
            latency_s=0.0,
            window=1,
        )


def measure_link(copier: Copier, num_bytes: int) -> LinkTimes:
    """Copies ``num_bytes`` (one expert) a few times each way. Blocks for well under a second on links above 1 GB/s."""
    host = copier.allocate_host((num_bytes,), torch.uint8)
    small = min(4096, num_bytes)
    device = [copier.allocate((num_bytes,), torch.uint8) for _ in range(2)]
    try:

        def down(window: int = 1) -> float:
            return _seconds(lambda: [copier.copy(device[0], host, "h2d") for _ in range(window)]) / window

        def up() -> float:
            return _seconds(lambda: [copier.copy(host, device[1], "d2h")])

        down_s, up_s = down(), up()
        both_s = _seconds(lambda: [copier.copy(device[0], host, "h2d"), copier.copy(host, device[1], "d2h")])
        latency_s = _seconds(lambda: [copier.copy(device[0][:small], host[:small], "h2d")])
        throughput = {window: down(window) for window in (1, 2, 4, 8)}
        window = min(w for w, seconds in throughput.items() if seconds <= 1.03 * min(throughput.values()))
    finally:
        for tensor in device:
            copier.free(tensor)
    share = max(1.0, both_s / max(down_s, up_s))
    latency_s = min(latency_s, down_s, up_s)
    return LinkTimes(
        h2d_s_per_byte=down_s / num_bytes,
        d2h_s_per_byte=up_s / num_bytes,
        h2d_duplex_s_per_byte=share * down_s / num_bytes,
        d2h_duplex_s_per_byte=share * up_s / num_bytes,
        latency_s=latency_s,
        window=max(2, window),
    )


def _seconds(start: Callable[[], list[Any]], repeats: int = 5) -> float:
    measured = []
    for _ in range(repeats + 1):
        begin_s = time.perf_counter()
        for event in start():
            event.wait()
        measured.append(time.perf_counter() - begin_s)
    return statistics.median(measured[1:])
