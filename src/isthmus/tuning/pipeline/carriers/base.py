"""The seam between messages and what carries them. Carriers raise ``RuntimeError``, as torch.distributed does; who
waited, for what and for whom, is added by ``Links``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Incoming(Protocol):
    """A message that is on its way here."""

    def is_here(self) -> bool:
        """Whether ``wait`` will not block, as far as can be seen. False may be wrong."""
        ...

    def wait(self) -> Tensor:
        """Blocks until it is here: its bytes, (bytes,) uint8, on the carrier's device."""
        ...


class Carrier(Protocol):
    """Carries messages between ranks. Messages of the same sender, receiver and tag come in the order of sending."""

    device: torch.device
    """Where messages lie."""

    def send(self, message: Tensor, to: int, tag: int) -> Callable[[], object]:
        """``message``, contiguous and on ``device``, leaves. Does not block; what is returned blocks until it has been
        taken, and before it must not change."""
        ...

    def receive(self, num_bytes: int, source: int, tag: int) -> Incoming:
        """A message of ``num_bytes`` is awaited from now on. Does not block."""
        ...

    def close(self) -> None:
        """Nothing will be sent any more, by anybody. Blocks until all have called this."""
        ...
