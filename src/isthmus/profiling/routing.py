"""Seconds of a layer's routing: sorting the rows of its tokens by expert, bringing them together, and back."""

from __future__ import annotations

from collections.abc import Callable

import torch

from isthmus.models.routing import combine, count_by_expert, gather, sort_by_expert, weight_gradients_of, weights_of
from isthmus.planning.curves import monotone
from isthmus.profiling.crowding import Forgetting, usual_s
from isthmus.profiling.timing import token_grid
from isthmus.spec.model import ExpertSpec
from isthmus.spec.profile import Curve


def measure_routing(
    spec: ExpertSpec,
    dtype: torch.dtype,
    *,
    device: torch.device,
    max_tokens: int,
    synchronize: Callable[[], None] = lambda: None,
) -> tuple[Curve, Curve]:
    """(forward, backward) curves, with caches as cold as in a step, of one layer's wave of up to ``max_tokens`` tokens
    (not rows), from the calling thread. Blocks for seconds."""

    def wave(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index_Tk = torch.rand(count, spec.num_experts, device=device).topk(spec.top_k).indices
        return (
            index_Tk,
            torch.rand(count, spec.top_k, device=device),
            torch.randn(count, spec.hidden_size).to(device, dtype),
        )

    def forward(count: int) -> Callable[[], object]:
        index_Tk, weights_Tk, hidden_TH = wave(count)

        def run() -> None:
            counts_E = count_by_expert(index_Tk, spec.num_experts)
            routing = sort_by_expert(index_Tk, spec.num_experts, counts_E)
            weights_of(weights_Tk, routing)
            inputs_SH = gather(torch.cat([hidden_TH]), routing)
            combine(torch.empty_like(inputs_SH), routing, *weights_Tk.shape)
            synchronize()

        return run

    def backward(count: int) -> Callable[[], object]:
        index_Tk, weights_Tk, hidden_TH = wave(count)

        def run() -> None:
            routing = sort_by_expert(index_Tk, spec.num_experts, count_by_expert(index_Tk, spec.num_experts))
            weights_S = weights_of(weights_Tk, routing)
            inputs_SH, gradients_SH = gather(hidden_TH, routing), gather(torch.cat([hidden_TH]), routing)
            combine(torch.empty_like(inputs_SH), routing, *weights_Tk.shape)
            weight_gradients_of(weights_S, routing, *weights_Tk.shape)
            del gradients_SH
            synchronize()

        return run

    with torch.no_grad():
        grid = token_grid(max_tokens)[4::2] or [max_tokens]
        return _usual_curve(forward, grid), _usual_curve(backward, grid)


def _usual_curve(task: Callable[[int], Callable[[], object]], grid: list[int]) -> Curve:
    forget = Forgetting()
    return monotone(Curve(num_tokens=tuple(grid), seconds=tuple(usual_s(task(count), forget) for count in grid)))
