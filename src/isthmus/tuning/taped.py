"""The dense part as the engine runs it, to be measured: graphs cut at every layer's border and around the experts,
random numbers seeded anew at each layer. What that costs belongs to the dense part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isthmus.models.moe_model import MoeModel, bound_parameters
from isthmus.profiling.dense import loss_of
from isthmus.training.random_state import random_state, restore_random_state, seed_random_state
from isthmus.tuning.tape import ExpertsCall, Segment, Tape


class TapedForward:
    """Called as ``profiling.dense.loss_of``; what it returns has a ``backward``. Experts take no time: their output is
    their input."""

    def __call__(self, model: MoeModel, inputs: dict[str, Tensor]) -> TapedLoss:
        tape = Tape(recording=True)
        device = next(bound_parameters(model)).device
        forwards = [layer.forward for layer in model.layers]

        def experts(layer: int, module: torch.nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            call = ExpertsCall(layer, module, hidden, index, weights)
            tape.open_experts(call)
            restore_random_state(hidden.device, random_state(hidden.device))
            return tape.close_experts(call, hidden.detach().clone())

        model.set_experts_function(experts)
        model.wrap_routers(lambda layer, logits: tape.cut_router_logits(logits))
        for number, (layer, forward) in enumerate(zip(model.layers, forwards, strict=True)):
            layer.forward = _taped(tape, number, forward, device)
        try:
            tape.loss = loss_of(model, inputs)
        finally:
            model.wrap_routers(lambda layer, logits: logits)
            for layer, forward in zip(model.layers, forwards, strict=True):
                layer.forward = forward
        return TapedLoss(tape)


def _taped(tape: Tape, number: int, forward: Callable[..., object], device: torch.device) -> Callable[..., object]:
    def run(*args: object, **kwargs: object) -> object:
        seed_random_state(device, number)
        returned = tape.run_layer(number, forward, args, kwargs)
        seed_random_state(device, number + 1)
        return returned

    return run


class TapedLoss:
    """Its ``backward`` goes back layer by layer."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def backward(self) -> None:
        tape = self._tape
        tape.backward_loss(1.0)
        while tape.segments:
            segment = tape.segments.pop()
            assert isinstance(segment, Segment)
            call = segment.experts
            if call is None:
                segment.finish(None, None)
                continue
            gradient = segment.gradient_of_experts_output()
            hidden = call.hidden
            segment.finish(
                torch.zeros_like(hidden) if gradient is None else gradient.view_as(hidden),
                torch.zeros_like(call.weights),
            )
