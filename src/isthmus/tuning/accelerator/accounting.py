"""What every accelerator keeps book of: its budget, the memory it handed out, the copies under way into that memory."""

from __future__ import annotations

import math
import mmap
import threading
from abc import abstractmethod

import torch
from torch import Tensor

from isthmus.reporting.recorder import Recorder
from isthmus.tuning.accelerator.base import Accelerator, AcceleratorMemoryError, Direction, Event, NotResidentError


def zeroed_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Page-aligned zeroed host memory, fresh from the system: it occupies nothing until it is written (or pinned)."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(shape)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class AccountedAccelerator(Accelerator):
    """Budget, allocations and residency for an implementation, which adds ``_new``, copies and order."""

    def __init__(self, *, budget_bytes: int, recorder: Recorder) -> None:
        if budget_bytes <= 0:
            raise ValueError(f"budget_bytes: got {budget_bytes}, wanted the bytes of memory that may be used, above 0.")
        self.recorder = recorder
        self.budget_bytes = budget_bytes
        self.allocated_bytes = 0
        self.peak_bytes = 0
        self._lock = threading.Lock()
        self._blocks: dict[int, Tensor] = {}
        self._arriving: dict[Event, tuple[int, int]] = {}
        """Copies under way to the accelerator that compute does not wait for: first address, and one past the last."""
        self._copied: dict[Direction, int] = {"h2d": 0, "d2h": 0}
        self._is_closed = False

    @abstractmethod
    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory on ``device``."""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._is_closed:
            raise RuntimeError("the accelerator is closed")
        self.reserve(num_bytes)
        try:
            tensor = self._new(shape, dtype)
        except BaseException:
            self.reserve(-num_bytes)
            raise
        if num_bytes:
            with self._lock:
                self._blocks[_address(tensor)] = tensor
        return tensor

    def free(self, tensor: Tensor) -> None:
        num_bytes = _num_bytes(tensor)
        if self._is_closed or not num_bytes:
            return
        with self._lock:
            block = self._blocks.get(_address(tensor))
            if block is None or block.data_ptr() != tensor.data_ptr() or _num_bytes(block) != num_bytes:
                raise ValueError(
                    f"tensor: got one of shape {tuple(tensor.shape)} that is a view, freed already or from elsewhere; "
                    "wanted what allocate() returned."
                )
            del self._blocks[_address(tensor)]
        self.reserve(-num_bytes)

    def reserve(self, num_bytes: int) -> None:
        with self._lock:
            allocated = self.allocated_bytes + num_bytes
            if num_bytes > 0 and allocated > self.budget_bytes:
                raise AcceleratorMemoryError(
                    f"accelerator memory: asked for {num_bytes} bytes with {self.allocated_bytes} of "
                    f"{self.budget_bytes} bytes allocated: raise --accelerator-memory by "
                    f"{allocated - self.budget_bytes} bytes."
                )
            if allocated < 0:
                raise ValueError(
                    f"num_bytes: got {num_bytes} with only {self.allocated_bytes} bytes allocated; "
                    "give back what was reserved, once."
                )
            self.allocated_bytes = allocated
            self.peak_bytes = max(self.peak_bytes, allocated)

    def allocate_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return zeroed_pages(shape, dtype)

    def require_resident(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            if not tensor.numel():
                continue
            first = tensor.data_ptr()
            extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            last = first + extent * tensor.element_size()
            with self._lock:
                is_known = _address(tensor) in self._blocks
                is_arriving = any(start < last and first < stop for start, stop in self._arriving.values())
            if not is_known:
                raise NotResidentError(
                    f"a tensor of shape {tuple(tensor.shape)} is not in the accelerator's memory: it was never "
                    "allocated there, or has been freed. Copy it to memory from allocate() first."
                )
            if is_arriving:
                raise NotResidentError(
                    f"a copy into a tensor of shape {tuple(tensor.shape)} is still under way: wait_for() its event."
                )

    def copied_bytes(self) -> dict[Direction, int]:
        with self._lock:
            return dict(self._copied)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._blocks.clear()
            self._arriving.clear()
            self.allocated_bytes = 0

    def _holds(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in memory that ``allocate`` handed out."""
        with self._lock:
            return _address(tensor) in self._blocks

    def _is_host(self, tensor: Tensor) -> bool:
        """Whether the tensor may be the host's side of a copy."""
        return not self._holds(tensor)

    def _check_copy(self, destination: Tensor, source: Tensor, direction: Direction) -> None:
        if direction not in self._copied:
            raise ValueError(f"direction: got {direction!r}, wanted 'h2d' or 'd2h'.")
        for field in ("shape", "dtype"):
            got, wanted = getattr(source, field), getattr(destination, field)
            if got != wanted:
                raise ValueError(
                    f"{field} of source: got {got}, wanted the destination's {wanted}: copies convert nothing."
                )
        if not (destination.is_contiguous() and source.is_contiguous()):
            raise ValueError(
                "copy: got a tensor with gaps, wanted two contiguous ones: copy whole ranges, or .contiguous() first."
            )
        if self.is_separate and not self._is_host(source if direction == "h2d" else destination):
            field = "source" if direction == "h2d" else "destination"
            raise ValueError(
                f"{field}: got accelerator memory, wanted host memory for {direction}: swap them or turn the direction."
            )

    def _begin(self, event: Event, destination: Tensor, direction: Direction) -> None:
        """Books a copy that is about to be queued."""
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the accelerator is closed")
            num_bytes = _num_bytes(destination)
            self._copied[direction] += num_bytes
            if direction == "h2d":
                self._arriving[event] = (destination.data_ptr(), destination.data_ptr() + num_bytes)

    def _arrived(self, event: Event) -> None:
        """The copy has ended, or compute waits for it."""
        with self._lock:
            self._arriving.pop(event, None)
