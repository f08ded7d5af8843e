"""No accelerator: compute works on host memory in place, so there is no separate memory and nothing needs copying."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from isthmus.reporting.recorder import Recorder
from isthmus.tuning.accelerator.accounting import AccountedAccelerator
from isthmus.tuning.accelerator.base import Direction, Event
from isthmus.tuning.accelerator.copy_engine import CopyEngine, CopyEvent


class HostAccelerator(AccountedAccelerator):
    """``copy`` is a memcpy on the calling thread, done when it returns; only ``on_done`` needs a thread."""

    name = "host"
    is_separate = False
    device = torch.device("cpu")

    def __init__(self, *, budget_bytes: int, recorder: Recorder) -> None:
        super().__init__(budget_bytes=budget_bytes, recorder=recorder)
        self._engine = CopyEngine("isthmus-host-copies")

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def copy(
        self,
        destination: Tensor,
        source: Tensor,
        direction: Direction,
        *,
        name: str = "",
        kind: str = "",
        after: Event | None = None,
        is_urgent: bool = False,
        on_done: Callable[[], object] | None = None,
    ) -> Event:
        self._check_copy(destination, source, direction)
        if after is not None:
            after.wait()
        event = CopyEvent(name)
        self._begin(event, destination, direction)
        with self.recorder.span(direction, name, kind=kind, num_bytes=source.numel() * source.element_size()):
            destination.detach().copy_(source.detach())
        self._arrived(event)
        event.happen(self.recorder.now_s())
        if on_done is not None:
            self._engine.submit(lambda: None, lambda error: on_done())
        return event

    def record(self) -> Event:
        return CopyEvent("compute", happened_s=self.recorder.now_s())

    def wait_for(self, event: Event) -> None:
        event.wait()

    def require_resident(self, *tensors: Tensor) -> None:
        """Nothing to check: all of host memory can be computed on."""

    def compute(self, name: str, *, kind: str = "", num_tokens: int = 0) -> AbstractContextManager[None]:
        return self.recorder.span("accelerator", name, kind=kind, num_tokens=num_tokens)

    def synchronize(self) -> None:
        self._engine.drain()

    def close(self) -> None:
        self._engine.close()
        super().close()
