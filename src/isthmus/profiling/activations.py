"""Bytes that one micro-batch's dense part keeps from forward for backward: measured where the model's weights are, or
counted from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from isthmus.models.moe_model import MoeModel, bound_parameters, on_device
from isthmus.models.skeleton import torch_dtype
from isthmus.planning.memory import SavedStorages
from isthmus.profiling.dense import Forward, loss_of, no_experts


def measure_saved_bytes(model: MoeModel, inputs: dict[str, Tensor], run: Forward = loss_of) -> int:
    """Runs the dense part forward once and counts what autograd saves, each storage once, parameters left out.

    ``inputs``: a micro-batch with labels; dense units must be bound. Replaces the model's experts function. Blocks.
    """
    device = next(bound_parameters(model)).device
    saved = _Saved(bound_parameters(model))
    saved.run(model, on_device(inputs, device), run)
    return sum(storage.nbytes() for storage in saved.storages.values())


def count_saved_bytes(model: MoeModel, inputs: dict[str, Tensor]) -> SavedStorages:
    """What ``measure_saved_bytes`` would measure on a CPU, layer by layer, without weights: the model's own forward
    code runs on tensors that have no memory. Integers (tokens, positions) and the masks made of them are real.

    ``inputs``: a micro-batch with labels, on the CPU. ``model`` must not be used for anything else afterwards: its
    dense units are bound to nothing. Blocks for seconds.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for key, layout in model.layouts.items():
        if not key.is_expert:
            with mode:
                flat = torch.empty(layout.numel, dtype=torch_dtype(layout.dtype))
            model.bind(key, flat)
    for router in model.routers.values():
        for child in router.modules():
            # Switch and NLLB-MoE cast routers to FP32, which theirs are; the way Module.to does it fakes do not go.
            setattr(child, "to", _unmoved(child))  # noqa: B010
    saved = _Saved(model.module.parameters())
    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(_entering(saved, mode, number), with_kwargs=True)
    model.layers[-1].register_forward_hook(lambda *_: saved.enter(len(model.layers)))
    saved.run(model, inputs)
    numbers = {identity: number for number, identity in enumerate(saved.storages)}
    places = [
        {numbers[identity]: saved.storages[identity].nbytes() for identity in saved.places.get(place, ())}
        for place in range(-1, len(model.layers) + 1)
    ]
    return SavedStorages(before=places[0], layers=tuple(places[1:-1]), after=places[-1])


def _unmoved(module: nn.Module) -> Callable[..., nn.Module]:
    return lambda *_args, **_kwargs: module


def _entering(saved: _Saved, mode: FakeTensorMode, number: int) -> Callable[..., Any]:
    """A hook that notes where forward is, and lets nothing real into a layer: there is no more to be decided, only
    large masks to be computed with."""

    def faked(value: object) -> object:
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            return mode.from_tensor(value)
        return value

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        saved.enter(number)
        return pytree.tree_map(faked, (args, kwargs))

    return enter


class _Saved:
    """What autograd saves while a model runs forward. ``storages`` by identity, ``places``: where each was saved."""

    def __init__(self, parameters: Any) -> None:
        self._parameters = {_identity(parameter) for parameter in parameters}
        # Held, not only counted: what part of the graph gives back at once must not lend its place to what comes next.
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.places: dict[int, set[int]] = {}
        self._place = -1

    def enter(self, place: int) -> None:
        self._place = place

    def run(self, model: MoeModel, inputs: dict[str, Tensor], run: Forward = loss_of) -> None:
        model.set_experts_function(no_experts)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            loss = run(model, inputs)
        del loss

    def _pack(self, tensor: Tensor) -> Tensor:
        identity = _identity(tensor)
        if identity not in self._parameters:
            self.storages[identity] = tensor.untyped_storage()
            self.places.setdefault(self._place, set()).add(identity)
        return tensor


def _identity(tensor: Tensor) -> int:
    """Of the tensor's storage, also of one without memory."""
    return tensor.untyped_storage()._cdata
