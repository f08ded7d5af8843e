"""Where experts' weight gradients go: straight into the store for the CPU, through a slot and one copy for the
accelerator. And how any gradient comes from the accelerator to the store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from torch import Tensor

from isthmus.spec.model import UnitKey
from isthmus.tuning.accelerator.base import Accelerator, Event
from isthmus.tuning.host_buffers import HostBuffers
from isthmus.tuning.optimizer import StoreOptimizer
from isthmus.tuning.protocols import Loader


class GradientReturn:
    """Brings gradients from the accelerator to the store, each in one copy.

    The first of a step overwrites what is there. A later one (of another flight) lands beside it and is added by the
    host, in the copy engine's thread, so that no more lie beside than copies are under way.
    """

    def __init__(
        self, accelerator: Accelerator, optimizer: StoreOptimizer, on_complete: Callable[[UnitKey], None]
    ) -> None:
        self.accelerator, self.optimizer, self.on_complete = accelerator, optimizer, on_complete
        self.buffers = HostBuffers(accelerator.allocate_host)

    def send(self, key: UnitKey, gradient: Tensor, name: str) -> Event:
        """``gradient`` (numel,), on the accelerator, leaves after the compute issued so far; ``on_complete(key)`` when
        it is in the store. Does not block. The event: ``gradient`` may be overwritten."""
        destination, adds = self.optimizer.gradient_destination(key)
        landing = self.buffers.take((destination.numel(),), destination.dtype) if adds else destination

        def landed() -> None:
            if adds:
                self.optimizer.add_gradient(key, landing)
                self.buffers.give(landing)
            self.on_complete(key)

        return self.accelerator.copy(
            landing,
            gradient,
            "d2h",
            name=name,
            kind="gradient",
            after=self.accelerator.record(),
            on_done=landed,
        )


class GradientSink:
    """Collects each expert's gradient over the waves of a backward pass.

    A gradient that arises on the accelerator stays there until the last wave has added its part, then leaves in one
    copy (APTMoE, section 4.3: gradients leave the accelerator with the stage). ``on_complete(key)`` is called once per
    expert and pass when all that the pass adds lies in the store: from the thread that calls ``close``, or from a copy
    engine's. An expert is computed on one side for the whole pass.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        loader: Loader,
        optimizer: StoreOptimizer,
        on_complete: Callable[[UnitKey], None],
    ) -> None:
        self.accelerator = accelerator
        self.loader = loader
        self.optimizer = optimizer
        self.on_complete = on_complete
        self.way_back = GradientReturn(accelerator, optimizer, on_complete)
        self._num_missing: dict[UnitKey, int] = {}
        self._slots: dict[UnitKey, Tensor] = {}
        self._lock = threading.Lock()

    def expect(self, num_parts: Mapping[UnitKey, int]) -> None:
        """How many waves will add to each expert's gradient in this pass. Those of the pass before must be complete."""
        with self._lock:
            self._num_missing = dict(num_parts)

    def open(self, key: UnitKey, *, on_cpu: bool) -> tuple[Tensor, bool]:
        """(flat gradient (numel,), whether to add to it rather than overwrite it). May block until a slot is free."""
        if on_cpu or not self.accelerator.is_separate:
            return self.optimizer.gradient_destination(key)
        adds = key in self._slots
        if not adds:
            self._slots[key] = self.loader.take_slot()
        return self._slots[key][: self.optimizer.store.numel(key)], adds

    def is_open(self, key: UnitKey) -> bool:
        """Whether a part of the expert's gradient lies on the accelerator: ``open`` takes no further slot then."""
        return key in self._slots

    def close(self, key: UnitKey) -> None:
        """A wave's part has been added. After the last one, what lies on the accelerator leaves for the store. Does not
        block."""
        with self._lock:
            self._num_missing[key] -= 1
            if self._num_missing[key]:
                return
        slot = self._slots.pop(key, None)
        if slot is None:
            self.on_complete(key)
            return
        gradient = slot[: self.optimizer.store.numel(key)]
        event = self.way_back.send(key, gradient, f"gradient L{key.layer} E{key.expert}")
        self.loader.give_slot(slot, event)
