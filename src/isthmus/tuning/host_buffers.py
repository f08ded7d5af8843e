"""Host buffers for token traffic, used again and again: fresh memory costs page faults, and under CUDA pinning."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor


class HostBuffers:
    """Lends host tensors of any shape out of flat buffers whose sizes are powers of two. Thread-safe."""

    def __init__(self, allocate_host: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> None:
        self._allocate_host = allocate_host
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._lent: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised host tensor, from a buffer given back earlier if one is large enough."""
        numel = math.prod(shape)
        capacity = max(1024, 1 << max(0, numel - 1).bit_length())
        with self._lock:
            free = self._free.setdefault((capacity, dtype), [])
            flat = free.pop() if free else None
        if flat is None:
            flat = self._allocate_host((capacity,), dtype)
        with self._lock:
            self._lent[flat.data_ptr()] = flat
        return flat[:numel].view(shape)

    def give(self, tensor: Tensor) -> None:
        """Takes back what ``take`` lent. The caller reads and writes it no more."""
        with self._lock:
            flat = self._lent.pop(tensor.data_ptr())
            self._free[flat.numel(), flat.dtype].append(flat)
