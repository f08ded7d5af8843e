"""The dense part as the engine runs it, to be measured: graphs cut at every layer's border and around the experts,
random numbers seeded anew at each layer. What that costs belongs to the dense part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isthmus.models.moe_model import ExpertsFunction, MoeModel, bound_parameters
from isthmus.profiling.crowding import Interruption
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
        model.set_experts_function(no_taped_experts(tape))
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


def no_taped_experts(tape: Tape, between: Interruption | None = None) -> ExpertsFunction:
    """Stands in for the routed experts, as ``profiling.dense.no_experts``, where the engine leaves a micro-batch.
    ``between``: what is done meanwhile."""

    def experts(layer: int, module: torch.nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        call = ExpertsCall(layer, module, hidden, index, weights)
        tape.open_experts(call)
        state = random_state(hidden.device)
        if between is not None:
            between()
        restore_random_state(hidden.device, state)
        return tape.close_experts(call, hidden.detach().clone())

    return experts


def run_taped_layer(
    tape: Tape, number: int, forward: Callable[..., object], args: tuple, kwargs: dict, device: torch.device
) -> object:
    seed_random_state(device, number)
    returned = tape.run_layer(number, forward, args, kwargs)
    seed_random_state(device, number + 1)
    return returned


def _taped(tape: Tape, number: int, forward: Callable[..., object], device: torch.device) -> Callable[..., object]:
    return lambda *args, **kwargs: run_taped_layer(tape, number, forward, args, kwargs, device)


class TapedLoss:
    """Its ``backward`` goes back layer by layer. Where the loss is another process's, what comes from there are ones.
    ``between``: what is done where experts would run."""

    def __init__(self, tape: Tape, between: Interruption | None = None) -> None:
        self._tape, self._between = tape, between

    def backward(self) -> None:
        tape = self._tape
        if tape.loss is None:
            self._take_ones()
        else:
            tape.backward_loss(1.0)
        while tape.segments:
            segment = tape.segments.pop()
            assert isinstance(segment, Segment)
            call = segment.experts
            if call is None:
                segment.finish(None, None)
                continue
            gradient = segment.gradient_of_experts_output()
            if self._between is not None:
                self._between(is_backward=True)
            hidden = call.hidden
            segment.finish(
                torch.zeros_like(hidden) if gradient is None else gradient.view_as(hidden),
                torch.zeros_like(call.weights),
            )

    def _take_ones(self) -> None:
        """For what other processes read: all router logits, and what the last layer returns."""
        segments = [segment for segment in self._tape.segments if isinstance(segment, Segment)]
        for cut in (*segments[-1].outputs, *(router for segment in segments for router in segment.routers)):
            cut.leaf.grad = torch.ones_like(cut.leaf)
