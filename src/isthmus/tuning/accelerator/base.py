"""The accelerator seam: a memory with a budget, one copy engine per direction, and order between copies and compute.

Three implementations pass one conformance suite (``tests/conformance/test_accelerator.py``): ``cuda`` (streams, events,
pinned memory), ``emulated`` (a separate memory on the CPU at set link rates) and ``host`` (no separate memory).

Threads: ``copy``, ``Event`` methods and ``free`` may be called from any thread; compute happens on one thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, Protocol, Self

import torch

from isthmus.reporting.recorder import Recorder
from isthmus.spec.errors import IsthmusError

Direction = Literal["h2d", "d2h"]


class AcceleratorMemoryError(IsthmusError, RuntimeError):
    """The budget does not hold what was asked for. The message states asked, allocated and budget bytes."""


class NotResidentError(RuntimeError):
    """Something was to be computed on data that is not (yet) in the accelerator's memory."""


class Event(Protocol):
    """A point in a copy engine's or the compute queue's order."""

    def is_done(self) -> bool:
        """Whether everything before the event has happened. Never blocks."""
        ...

    def wait(self) -> None:
        """Blocks the calling host thread until the event has happened (GIL released). Raises what the copy raised."""
        ...


class Accelerator(ABC):
    """A device on which experts can be computed.

    ``is_separate`` is False only for ``host``, where host tensors are computed on in place and nothing is ever copied.
    ``budget_bytes`` bounds what ``allocate`` hands out and what ``reserve`` announces; ``peak_bytes`` is the most there
    was of both.
    """

    name: str
    is_separate: bool
    device: torch.device
    budget_bytes: int
    allocated_bytes: int
    peak_bytes: int
    recorder: Recorder
    """Gets a span for each copy (lanes ``h2d``, ``d2h``) and for each ``compute`` (lane ``accelerator``)."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised accelerator memory. Raises ``AcceleratorMemoryError`` when the budget would be exceeded."""

    @abstractmethod
    def free(self, tensor: torch.Tensor) -> None:
        """Gives back what ``allocate`` handed out (the very tensor, not a view)."""

    @abstractmethod
    def reserve(self, num_bytes: int) -> None:
        """Counts what the framework allocates itself (activations) against the budget; negative numbers give back."""

    @abstractmethod
    def allocate_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed host memory from which copies are fast: pinned for CUDA (exactly as many bytes), plain otherwise."""

    @abstractmethod
    def copy(
        self,
        destination: torch.Tensor,
        source: torch.Tensor,
        direction: Direction,
        *,
        name: str = "",
        kind: str = "",
        after: Event | None = None,
        is_urgent: bool = False,
        on_done: Callable[[], object] | None = None,
    ) -> Event:
        """Queues a copy and returns at once with the event of its end.

        Copies of one direction run one at a time, in the order asked for, and cannot be interrupted; the two directions
        run at once. ``after``: the copy starts no earlier than this event (a slot's last reader, a gradient's source).
        ``on_done``: a callable without arguments, called from an engine thread (never the caller's) when the copy ended
        or failed, after its event has happened. Shapes and dtypes must match and both tensors be contiguous
        (``ValueError``).
        """

    @abstractmethod
    def record(self) -> Event:
        """An event at the present end of the compute queue (at once done where compute is synchronous)."""

    @abstractmethod
    def wait_for(self, event: Event) -> None:
        """Compute issued from now on starts no earlier than ``event``. Blocks only where compute is synchronous."""

    @abstractmethod
    def require_resident(self, *tensors: torch.Tensor) -> None:
        """Raises ``NotResidentError`` unless each tensor is a view of memory that ``allocate`` handed out, that is not
        freed, and into which no copy is still under way that ``wait_for`` has not been called for."""

    @abstractmethod
    def compute(self, name: str, *, kind: str = "", num_tokens: int = 0) -> AbstractContextManager[None]:
        """Marks compute on the accelerator lane of the timeline."""

    @abstractmethod
    def synchronize(self) -> None:
        """Blocks until every copy and all compute has ended. Raises the first error a copy had."""

    @abstractmethod
    def copied_bytes(self) -> dict[Direction, int]:
        """Bytes copied so far by direction (queued ones count)."""

    @abstractmethod
    def close(self) -> None:
        """Ends engine threads and gives memory back. Idempotent."""
