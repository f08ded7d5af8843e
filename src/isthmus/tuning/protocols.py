"""The seams inside the fine-tuning runtime: what the engine asks of a loader and of a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from isthmus.spec.model import UnitKey
from isthmus.spec.plan import LayerSplit
from isthmus.tuning.accelerator.base import Event


class Loader(Protocol):
    """Brings experts' weights into slots of accelerator memory. ``ExpertLoader`` and ``HostLoader`` implement it."""

    def is_resident(self, key: UnitKey) -> bool: ...

    def acquire(self, key: UnitKey) -> Tensor: ...

    def release(self, *keys: UnitKey) -> None: ...

    def invalidate(self, keys: Sequence[UnitKey] | None = None) -> None: ...

    def take_slot(self) -> Tensor: ...

    def give_slot(self, slot: Tensor, after: Event | None) -> None: ...

    def close(self) -> None: ...


class Policy(ABC):
    """Decides where each expert runs and what is loaded when. Never changes a result, only where and when it arises.

    The engine calls these in the order of a step: ``begin_step``, ``begin_forward``, then per layer ``enter_forward``
    and one ``split_forward`` per wave, ``begin_backward``, then per layer from the last ``enter_backward`` and
    ``split_backward``. All calls come from the engine's thread, except ``layer_ready``, which may come from the CPU
    worker's. A step may have several passes of either kind, in turns (see ``planning.flights``).
    """

    name: str
    num_waves: int = 1
    """Into how many groups the next pass's micro-batches are to be split whose experts run together; while one group's
    experts run on the CPU, another group's dense part can run on the accelerator."""

    @abstractmethod
    def begin_step(self) -> None:
        """All weights on the accelerator are stale from here on."""

    @abstractmethod
    def begin_forward(self) -> None:
        """A forward pass (of a step or of an evaluation) is about to start."""

    @abstractmethod
    def layer_ready(self, layer: int) -> None:
        """The layer's weights on the host are current: its experts may be loaded."""

    @abstractmethod
    def enter_forward(self, layer: int) -> None:
        """The first micro-batch is about to run the layer."""

    @abstractmethod
    def split_forward(self, layer: int, counts_E: list[int], hidden_TH: Tensor, index_Tk: Tensor) -> LayerSplit:
        """Where the experts of this wave run. ``hidden_TH`` is what the router saw, ``index_Tk`` what it chose."""

    @abstractmethod
    def begin_backward(self, counts_LE: dict[int, list[int]], *, is_last: bool) -> None:
        """Forward is over; ``counts_LE`` are its counts of every MoE layer. ``is_last``: no other forward pass with the
        same weights follows."""

    @abstractmethod
    def enter_backward(self, layer: int) -> None:
        """Backward is about to reach the layer."""

    @abstractmethod
    def split_backward(self, layer: int) -> LayerSplit:
        """Where the layer's experts run in backward; the same answer for all waves of a pass."""

    @abstractmethod
    def leave_backward(self, layer: int) -> None:
        """The layer's backward is over; its weights are not needed again in this pass."""

    @abstractmethod
    def next_use(self, key: UnitKey) -> float:
        """Position from this forward pass on at which the expert is wanted on the accelerator next; ``inf``: not again.
        Thread-safe."""
