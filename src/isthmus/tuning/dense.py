"""Everything that is not a routed expert, on the accelerator: its weights, its gradients, and their way up and down.

What lies outside every layer stays. The layers share ``num_buffers`` buffers, layer ``l`` always in buffer
``l mod num_buffers``. With as many buffers as layers everything stays (resident). With fewer the layers pass through
(streamed): once all micro-batches have left layer ``l``, its buffer is handed on, forward to ``l + num_buffers``,
backward to ``l - num_buffers``; so backward finds the last layers where forward left them. The assignment is fixed
because autograd keeps views of the weights that forward read: in backward the same weights must lie at the same
addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from isthmus.models.moe_model import MoeModel
from isthmus.planning import memory
from isthmus.spec.model import OUTER_LAYER, UnitKey
from isthmus.tuning.accelerator.base import Accelerator, Event, NotResidentError
from isthmus.tuning.gradients import GradientReturn
from isthmus.tuning.optimizer import StoreOptimizer
from isthmus.tuning.parameter_store import ParameterStore


def dense_bytes(store: ParameterStore, num_buffers: int) -> int:
    """Bytes that ``DenseUnits`` asks of a separate accelerator: weights and gradients."""
    return memory.dense_bytes({key: store.layout(key) for key in store.keys}, num_buffers)


def _first_layer(layer: int, num_buffers: int) -> int:
    """Names the buffer of ``layer``: the first layer that is in it."""
    return layer if layer == OUTER_LAYER else layer % num_buffers


@dataclass(eq=False, slots=True)
class _Buffer:
    """Memory for the dense units of one layer at a time. ``layer``: whose weights are there or will come next."""

    layer: int
    free_from: Event
    """The end of all compute that read what was there before."""
    is_loaded: bool = False
    """Whether the copy of the layer's current weights was started."""
    landing: list[Event] = field(default_factory=list)
    """Copies that compute has not been told to wait for."""
    leaving: list[Event] = field(default_factory=list)
    """Copies that still read the gradients of the layer before."""


class DenseUnits:
    """Binds the model's dense parameters to accelerator memory (or, without a separate one, to the store itself).

    Gradients accumulate where autograd leaves them, in ranges laid out like the weights, over all of a step's backward
    passes; where another layer takes a layer's place they leave with every pass. ``on_complete(key)`` is called when
    one that left lies in the store.

    The order of calls, on the computing thread: ``begin_step`` before the optimizer changes anything; for a pass,
    ``begin_forward`` or ``begin_backward``, then per layer ``enter_…`` before the first micro-batch and ``leave_…``
    after the last. Only ``upload`` may come from another thread.
    """

    def __init__(
        self,
        model: MoeModel,
        store: ParameterStore,
        accelerator: Accelerator,
        optimizer: StoreOptimizer,
        on_complete: Callable[[UnitKey], None],
        *,
        num_buffers: int,
    ) -> None:
        """Allocates, zeroed; ``upload`` brings the weights. ``num_buffers``: from 1 to the model's number of layers,
        and at least ``planning.memory.num_dense_buffers`` for a model in training."""
        self.model = model
        self.store = store
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.on_complete = on_complete
        self.way_back = GradientReturn(accelerator, optimizer, on_complete)
        self.num_buffers = num_buffers
        self.num_layers = model.spec.num_layers
        self.keys = sorted(key for key in store.keys if not key.is_expert)
        self._by_layer = {key.layer: [other for other in self.keys if other.layer == key.layer] for key in self.keys}
        self._weights: dict[UnitKey, Tensor] = {}
        self._gradients: dict[UnitKey, Tensor] = {}
        self._blocks: list[Tensor] = []
        self._is_first = self._is_last = True
        """Of the step's backward passes, the present one."""
        self._lock = threading.Lock()
        self._current: set[int] = set()
        """Layers whose weights on the host are those of the present step."""
        for keys in memory.dense_rooms(self.keys, num_buffers).values():
            self._place(keys)
        for key in self.keys:
            model.bind(key, self._weights[key])
            offset = 0
            for parameter in model.parameters_of(key).values():
                parameter.grad = self._gradients[key][offset : offset + parameter.numel()].view(parameter.shape)
                offset += parameter.numel()
        free_from = accelerator.record()
        firsts = dict.fromkeys(_first_layer(key.layer, num_buffers) for key in self.keys)
        self._buffers = {layer: _Buffer(layer, free_from) for layer in firsts}

    def _place(self, keys: list[UnitKey]) -> None:
        """Finds memory for units that share it."""
        kinds = (self._weights, self.store.weight), (self._gradients, self.store.gradient)
        for placed, of_store in kinds:
            flats = {key: of_store(key) for key in keys}
            if self.accelerator.is_separate:
                largest = max(flats.values(), key=Tensor.numel)
                # Zeros, since measuring computes on whatever is there.
                block = self.accelerator.allocate((largest.numel(),), largest.dtype).zero_()
                self._blocks.append(block)
                flats = {key: block[: flat.numel()] for key, flat in flats.items()}
            placed.update(flats)

    @property
    def layers(self) -> list[int]:
        """The layers whose dense units these are, in order, ``OUTER_LAYER`` first if it is among them."""
        return sorted(self._by_layer)

    @property
    def is_resident(self) -> bool:
        """Whether every layer has memory of its own."""
        return self.num_buffers >= self.num_layers

    def h2d_bytes(self, *, is_backward: bool) -> int:
        """Bytes of weights that a step's pass brings to the accelerator: forward all, backward those that did not
        stay."""
        if not self.accelerator.is_separate:
            return 0
        first_that_stays = self.num_layers - self.num_buffers
        keys = [key for key in self.keys if not is_backward or 0 <= key.layer < first_that_stays]
        return sum(self.store.weight(key).nbytes for key in keys)

    def of_layer(self, layer: int) -> list[UnitKey]:
        return self._by_layer.get(layer, [])

    def free(self) -> None:
        """Gives the memory back; the model's parameters lie in the store from here on. No copy may be under way."""
        for key in self.keys:
            for parameter in self.model.parameters_of(key).values():
                parameter.grad = None
            self.model.bind(key, self.store.weight(key))
        for block in self._blocks:
            self.accelerator.free(block)
        self._weights.clear()
        self._gradients.clear()
        self._blocks.clear()

    # --- weights -----------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """All weights on the accelerator are stale from here on; each layer awaits its ``upload``."""
        with self._lock:
            self._current.clear()
        for first in self._buffers:
            self._bring(first)

    def upload(self, layer: int) -> None:
        """The layer's weights on the host are new: they leave for the accelerator, now if the layer's buffer is theirs,
        else once it is. Does not block."""
        buffer = self._buffer(layer)
        with self._lock:
            self._current.add(layer)
            if buffer.layer == layer:
                self._load(buffer)

    def begin_forward(self) -> None:
        """A forward pass (of a step or of an evaluation) is about to start: the first layers are called back."""
        for first, buffer in self._buffers.items():
            if buffer.layer != first:
                self._bring(first)

    def enter_forward(self, layer: int) -> None:
        """Compute from now on sees the layer's current weights. Blocks like ``Accelerator.wait_for``.

        ``upload`` must have been called for the layer, and all micro-batches must have left the one before it in its
        buffer, else ``NotResidentError``.
        """
        buffer = self._buffer(layer)
        with self._lock:
            landing, buffer.landing = buffer.landing, []
        for event in landing:
            self.accelerator.wait_for(event)
        self.require(layer)

    def leave_forward(self, layer: int) -> None:
        """All compute of the pass on the layer has been issued. Does not block."""
        self._hand_on(layer, layer + self.num_buffers)

    def require(self, layer: int) -> None:
        """Raises ``NotResidentError`` unless compute may read the layer's weights."""
        if not self.accelerator.is_separate:
            return
        buffer = self._buffer(layer)
        if buffer.layer != layer or not buffer.is_loaded:
            raise NotResidentError(
                f"layer {layer}: its dense weights are not on the accelerator; the buffer is layer {buffer.layer}'s. "
                "Wait for its optimizer step, and let all micro-batches leave the layers before it."
            )
        self.accelerator.require_resident(*(self._weights[key] for key in self.of_layer(layer)))

    def _buffer(self, layer: int) -> _Buffer:
        return self._buffers[_first_layer(layer, self.num_buffers)]

    def _hand_on(self, layer: int, following: int) -> None:
        if layer != OUTER_LAYER and 0 <= following < self.num_layers:
            self._bring(following)

    def _bring(self, layer: int) -> None:
        """The buffer is the layer's from here on; whatever compute was issued may still read what is there."""
        buffer, free_from = self._buffer(layer), self.accelerator.record()
        with self._lock:
            buffer.layer, buffer.is_loaded, buffer.free_from = layer, False, free_from
            if layer in self._current:
                self._load(buffer)

    def _load(self, buffer: _Buffer) -> None:
        """Under the lock: starts the copies."""
        buffer.is_loaded = True
        if self.accelerator.is_separate:
            # Not in place of those there: one that nobody waited for may still be on its way to the same memory.
            buffer.landing += [
                self.accelerator.copy(
                    self._weights[key],
                    self.store.weight(key),
                    "h2d",
                    name=f"dense L{key.layer}",
                    kind="load_dense",
                    after=buffer.free_from,
                )
                for key in self.of_layer(buffer.layer)
            ]

    # --- gradients ---------------------------------------------------------------------------------------------------

    def begin_backward(self, *, is_first: bool = True, is_last: bool = True) -> None:
        """A backward pass, the first or last of a step or neither, is about to start, with what lies behind the last
        layer, if that is here."""
        self._is_first, self._is_last = is_first, is_last
        if OUTER_LAYER in self._by_layer:
            self._zero(OUTER_LAYER)

    def enter_backward(self, layer: int) -> None:
        """As ``enter_forward``; the layer's gradients are zero, or those of the passes before, and the one before it in
        its buffer has its own."""
        self.enter_forward(layer)
        self._zero(layer)

    def that_leave(self, layer: int) -> list[UnitKey]:
        """The layer's units, if their gradients leave with this pass."""
        return self.of_layer(layer) if self._is_last or self._is_shared(layer) else []

    def leave_backward(self, layer: int) -> None:
        """The pass has added all to the layer's gradients: those ``that_leave`` set off for the store. Does not
        block."""
        buffer = self._buffer(layer)
        for key in self.that_leave(layer):
            if self.accelerator.is_separate:
                buffer.leaving.append(self.way_back.send(key, self._gradients[key], f"dense gradient L{layer}"))
            else:
                self.optimizer.gradient_destination(key)
                self.on_complete(key)
        self._hand_on(layer, layer - self.num_buffers)

    def _is_shared(self, layer: int) -> bool:
        """Whether other layers pass through the layer's buffer."""
        if layer == OUTER_LAYER:
            return False
        return layer >= self.num_buffers or layer + self.num_buffers < self.num_layers

    def _zero(self, layer: int) -> None:
        buffer = self._buffer(layer)
        for event in buffer.leaving:
            self.accelerator.wait_for(event)
        buffer.leaving.clear()
        if self._is_first or self._is_shared(layer):
            for key in self.of_layer(layer):
                self._gradients[key].zero_()
