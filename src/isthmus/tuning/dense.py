"""Everything that is not a routed expert, resident on the accelerator: its weights, its gradients, and their way to the
host."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from isthmus.models.moe_model import MoeModel
from isthmus.spec.model import UnitKey
from isthmus.tuning.accelerator.base import Accelerator, Event
from isthmus.tuning.optimizer import StoreOptimizer
from isthmus.tuning.parameter_store import ParameterStore


def dense_bytes(store: ParameterStore) -> int:
    """Bytes that ``DenseUnits`` asks of a separate accelerator: weights and gradients."""
    return sum(2 * store.weight(key).nbytes for key in store.keys if not key.is_expert)


class DenseUnits:
    """Binds the model's dense parameters to accelerator memory (or, without a separate one, to the store itself).

    Gradients accumulate where autograd leaves them, in ranges laid out like the weights. ``on_complete(key)`` is called
    once per unit and step when its gradient lies in the store.
    """

    def __init__(
        self,
        model: MoeModel,
        store: ParameterStore,
        accelerator: Accelerator,
        optimizer: StoreOptimizer,
        on_complete: Callable[[UnitKey], None],
    ) -> None:
        self.store = store
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.on_complete = on_complete
        self.keys = sorted(key for key in model.layouts if not key.is_expert)
        self._weights: dict[UnitKey, Tensor] = {}
        self._gradients: dict[UnitKey, Tensor] = {}
        self._landed: dict[UnitKey, Event] = {}
        for key in self.keys:
            weight, gradient = store.weight(key), store.gradient(key)
            if accelerator.is_separate:
                weight = accelerator.allocate((weight.numel(),), weight.dtype)
                gradient = accelerator.allocate((gradient.numel(),), gradient.dtype)
            self._weights[key], self._gradients[key] = weight, gradient
            model.bind(key, weight)
            offset = 0
            for parameter in model.parameters_of(key).values():
                parameter.grad = gradient[offset : offset + parameter.numel()].view(parameter.shape)
                offset += parameter.numel()

    def of_layer(self, layer: int) -> list[UnitKey]:
        return [key for key in self.keys if key.layer == layer]

    def upload(self, layer: int) -> None:
        """Starts bringing the layer's weights to the accelerator after they changed on the host. Does not block."""
        if not self.accelerator.is_separate:
            return
        for key in self.of_layer(layer):
            self._landed[key] = self.accelerator.copy(
                self._weights[key], self.store.weight(key), "h2d", name=f"dense L{layer}", kind="load_dense"
            )

    def wait(self, layer: int) -> None:
        """Compute from now on sees the layer's current weights. ``upload`` must have been called for them."""
        for key in self.of_layer(layer):
            event = self._landed.pop(key, None)
            if event is not None:
                self.accelerator.wait_for(event)

    def zero_gradients(self) -> None:
        for gradient in self._gradients.values():
            gradient.zero_()

    def flush(self, layer: int) -> None:
        """The layer's gradients are whole: they leave for the store. Does not block."""
        for key in self.of_layer(layer):
            destination, _ = self.optimizer.gradient_destination(key)
            if not self.accelerator.is_separate:
                self.on_complete(key)
                continue
            self.accelerator.copy(
                destination,
                self._gradients[key],
                "d2h",
                name=f"dense gradient L{layer}",
                kind="gradient",
                after=self.accelerator.record(),
                on_done=lambda key=key: self.on_complete(key),
            )
