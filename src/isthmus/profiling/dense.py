"""Seconds of everything but the routed experts: the model's own code, run once forward and backward with the experts
left out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isthmus.models.moe_model import MoeModel, bound_parameters, on_device
from isthmus.profiling.timing import fastest_s


def no_experts(layer: int, module: torch.nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Stands in for the routed experts: (T, H) in and out, differentiable in both, with almost no work."""
    return hidden * weights.sum(-1, keepdim=True).to(hidden.dtype)


Forward = Callable[[MoeModel, dict[str, Tensor]], Tensor]
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
) -> tuple[float, float]:
    """(forward, backward) seconds per token and layer; embeddings, head and loss are spread over the layers.

    ``inputs`` is a micro-batch with labels; the model's dense units must be bound. Blocks for about a second. Leaves
    gradients in the parameters (zero them) and the model's experts function replaced (set it).
    """

    model.set_experts_function(no_experts)
    inputs = on_device(inputs, next(bound_parameters(model)).device)

    def forward() -> Tensor:
        loss = run(model, inputs)
        synchronize()
        return loss

    def both() -> None:
        forward().backward()
        synchronize()

    forward_s = fastest_s(forward, repeats=3, budget_s=1.0)
    both_s = fastest_s(both, repeats=3, budget_s=2.0)
    per = num_tokens * model.spec.num_held_layers
    return forward_s / per, max(both_s - forward_s, forward_s) / per
