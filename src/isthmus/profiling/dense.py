"""Seconds of everything but the routed experts: the model's own code, run once forward and backward with the experts
left out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from isthmus.models.moe_model import MoeModel, bound_parameters, on_device
from isthmus.profiling.crowding import Interruption, usual_s
from isthmus.profiling.timing import median_s


def no_experts(layer: int, module: torch.nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Stands in for the routed experts: (T, H) in and out, differentiable in both, with almost no work."""
    return hidden * weights.sum(-1, keepdim=True).to(hidden.dtype)


REPEATS = 5


class Loss(Protocol):
    def backward(self) -> None: ...


Forward = Callable[[MoeModel, dict[str, Tensor]], Loss]
"""Runs what this process has of a model on a micro-batch (tensors on the device): something to call ``backward`` on."""


def loss_of(model: MoeModel, inputs: dict[str, Tensor]) -> Tensor:
    """The loss of a whole model."""
    return model.module(**inputs, **model.forward_arguments()).loss


def measure_dense(
    model: MoeModel,
    inputs: dict[str, Tensor],
    *,
    num_tokens: int,
    synchronize: Callable[[], None] = lambda: None,
    run: Forward = loss_of,
    interrupt: Interruption | None = None,
) -> tuple[float, float]:
    """(forward, backward) seconds per token and layer; embeddings, head and loss are spread over the layers.

    ``inputs`` is a micro-batch with labels; the model's dense units must be bound. By themselves, or with ``interrupt``
    as they are in a step: after it, and without what ``run`` spends in it. Blocks for about a second.
    Leaves gradients in the parameters (zero them) and the model's experts function replaced (set it).
    """

    model.set_experts_function(no_experts)
    inputs = on_device(inputs, next(bound_parameters(model)).device)

    def forward() -> Loss:
        loss = run(model, inputs)
        synchronize()
        return loss

    def both() -> None:
        forward().backward()
        synchronize()

    if interrupt is None:
        forward_s = median_s(forward, repeats=REPEATS, budget_s=1.0)
        both_s = median_s(both, repeats=REPEATS, budget_s=2.0)
    else:
        forward_s, both_s = usual_s(forward, interrupt), usual_s(both, interrupt)
    per = num_tokens * model.spec.num_held_layers
    return forward_s / per, max(both_s - forward_s, forward_s) / per


def measure_outer(
    model: MoeModel,
    inputs: dict[str, Tensor],
    *,
    num_tokens: int,
    synchronize: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """(forward, backward) seconds per token of what lies before the first layer and behind the last: part of what
    ``measure_dense`` finds for all layers. Called after it, and as it."""
    model.set_experts_function(no_experts)
    inputs = on_device(inputs, next(bound_parameters(model)).device)
    found = [_OuterTimes(model, synchronize).measure(inputs) for _ in range(REPEATS)]
    forward_s, backward_s = (statistics.median(times) for times in zip(*found, strict=True))
    return forward_s / num_tokens, backward_s / num_tokens


class _OuterTimes:
    """Looks at the clock when the first layer is entered and the last is left, in both passes."""

    def __init__(self, model: MoeModel, synchronize: Callable[[], None]) -> None:
        self._model, self._synchronize = model, synchronize
        self._seen_s: dict[str, float] = {}

    def _look(self, place: str) -> None:
        self._synchronize()
        self._seen_s[place] = time.perf_counter()

    def _entered(self, args: tuple, kwargs: dict) -> None:
        self._look("entered")
        self._hook("left again", (args, kwargs))

    def _left(self, output: object) -> None:
        self._look("left")
        self._hook("back", output)

    def _hook(self, place: str, values: object) -> None:
        for value in pytree.tree_leaves(values):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda gradient: self._look(place))

    def measure(self, inputs: dict[str, Tensor]) -> tuple[float, float]:
        first, last = self._model.layers[0], self._model.layers[-1]
        handles = [
            first.register_forward_pre_hook(lambda module, args, kwargs: self._entered(args, kwargs), with_kwargs=True),
            last.register_forward_hook(lambda module, args, output: self._left(output)),
        ]
        try:
            self._look("begun")
            loss = loss_of(self._model, inputs)
            self._look("loss")
            loss.backward()
            self._look("ended")
        finally:
            for handle in handles:
                handle.remove()
        at = self._seen_s
        forward_s = at["entered"] - at["begun"] + at["loss"] - at["left"]
        return forward_s, at["back"] - at["loss"] + at["ended"] - at.get("left again", at["ended"])
