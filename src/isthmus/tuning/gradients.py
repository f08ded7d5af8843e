"""Where experts' weight gradients go: straight into the store for the CPU, through a slot and one copy for the
accelerator."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from isthmus.spec.model import UnitKey
from isthmus.tuning.accelerator.base import Accelerator
from isthmus.tuning.optimizer import StoreOptimizer
from isthmus.tuning.protocols import Loader


class GradientSink:
    """Collects each expert's gradient over the waves of one step.

    A gradient that arises on the accelerator stays there until the layer's last wave, then leaves in one copy
    (APTMoE, section 4.3: gradients leave the accelerator with the stage). ``on_complete(key)`` is called once per
    expert and step when its whole gradient lies in the store: from the thread that calls ``flush``, or from a copy
    engine's.
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
        self._in_place: dict[int, set[UnitKey]] = {}
        self._slots: dict[int, dict[UnitKey, Tensor]] = {}

    def open(self, key: UnitKey, *, on_cpu: bool) -> tuple[Tensor, bool]:
        """(flat gradient (numel,), whether to add to it rather than overwrite it). May block until a slot is free."""
        if on_cpu or not self.accelerator.is_separate:
            self._in_place.setdefault(key.layer, set()).add(key)
            return self.optimizer.gradient_destination(key)
        slots = self._slots.setdefault(key.layer, {})
        adds = key in slots
        if not adds:
            slots[key] = self.loader.take_slot()
        return slots[key][: self.optimizer.store.numel(key)], adds

    def is_open(self, key: UnitKey) -> bool:
        """Whether a part of the expert's gradient lies on the accelerator: ``open`` takes no further slot then."""
        return key in self._slots.get(key.layer, {})

    def flush(self, layer: int) -> None:
        """The layer's last wave has run: what lies on the accelerator leaves for the store. Does not block."""
        for key in sorted(self._in_place.pop(layer, ())):
            self.on_complete(key)
        computed = self.accelerator.record()
        for key, slot in self._slots.pop(layer, {}).items():
            destination, _ = self.optimizer.gradient_destination(key)
            event = self.accelerator.copy(
                destination,
                slot[: destination.numel()],
                "d2h",
                name=f"gradient L{key.layer} E{key.expert}",
                kind="gradient",
                after=computed,
                on_done=lambda key=key: self.on_complete(key),
            )
            self.loader.give_slot(slot, event)
