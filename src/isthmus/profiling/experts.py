"""Seconds of one expert by token count, forward and backward, with weights as cold as they are in a training step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from isthmus.models.expert_math import ExpertMath
from isthmus.profiling.crowding import FORGOTTEN_BYTES
from isthmus.profiling.timing import measure_curve, token_grid
from isthmus.spec.model import ExpertSpec
from isthmus.spec.profile import Curve

COLD_BYTES = 96 << 20
"""Weights rotate through at least this much memory."""
MOST_COPIES = 256
"""Of small experts."""


def measure_expert(
    spec: ExpertSpec,
    dtype: torch.dtype,
    *,
    device: torch.device,
    max_tokens: int,
    synchronize: Callable[[], None] = lambda: None,
    activation_module: torch.nn.Module | None = None,
    saves: bool = False,
    accumulates: bool = False,
    cold_bytes: int = COLD_BYTES,
) -> tuple[Curve, Curve]:
    """(forward, backward) curves of one expert, 1 to ``max_tokens`` tokens, on ``device`` from the calling thread.
    Blocks for seconds.

    Backward includes the recomputation of the pre-activations, unless forward ``saves`` them, and adds to weight
    gradients where it ``accumulates``. Weights rotate through ``cold_bytes``. ``synchronize`` waits for an asynchronous
    device.
    """
    math = ExpertMath(spec, activation_module)
    num_copies = _copies(spec, dtype, cold_bytes)
    flats = [torch.empty(spec.numel, dtype=dtype, device=device).normal_(std=0.02) for _ in range(num_copies)]
    gradients = [torch.zeros_like(flat) for flat in flats]  # touched: page faults are not what is measured
    weights = [math.views(flat) for flat in flats]
    gradient_views = [math.views(flat) for flat in gradients]
    turn = itertools.cycle(range(num_copies))

    def inputs(count: int) -> tuple[Tensor, Tensor]:
        x_NH = torch.randn(count, spec.hidden_size, device=device).to(dtype)
        return x_NH, torch.rand(count, device=device).to(dtype)

    def forward(count: int) -> Callable[[], object]:
        x_NH, scale_N = inputs(count)

        def run() -> None:
            math.forward_many([weights[next(turn)]], [count], x_NH, scale_N, save=saves)
            synchronize()

        return run

    def backward(count: int) -> Callable[[], object]:
        x_NH, scale_N = inputs(count)
        g_NH, _ = inputs(count)
        kept = [torch.randn(count, math.pre_size, device=device).to(dtype) if saves else None]

        def run() -> None:
            at = next(turn)
            math.backward_many(
                [weights[at]], [count], x_NH, scale_N, g_NH, kept, [gradient_views[at]], accumulate=[accumulates]
            )
            synchronize()

        return run

    with torch.no_grad():
        grid = token_grid(max_tokens)
        return measure_curve(forward, grid), measure_curve(backward, grid)


def one_expert(
    spec: ExpertSpec, dtype: torch.dtype, *, num_tokens: int, saves: bool, activation_module: torch.nn.Module | None
) -> tuple[Callable[[], object], Callable[[], object]]:
    """(forward, backward) of one expert of ``num_tokens`` rows on the CPU, each time another."""
    math = ExpertMath(spec, activation_module)
    num_copies = _copies(spec, dtype, COLD_BYTES)
    flats = [torch.empty(spec.numel, dtype=dtype).normal_(std=0.02) for _ in range(num_copies)]
    weights = [math.views(flat) for flat in flats]
    gradients = [math.views(torch.zeros_like(flat)) for flat in flats]
    x_NH, g_NH = (torch.randn(num_tokens, spec.hidden_size).to(dtype) for _ in range(2))
    scale_N, pre_NP = torch.rand(num_tokens).to(dtype), torch.randn(num_tokens, math.pre_size).to(dtype)
    turn = itertools.cycle(range(num_copies))

    def forward() -> None:
        math.forward_many([weights[next(turn)]], [num_tokens], x_NH, scale_N, save=saves)

    def backward() -> None:
        at, kept = next(turn), [pre_NP.clone() if saves else None]
        math.backward_many([weights[at]], [num_tokens], x_NH, scale_N, g_NH, kept, [gradients[at]], accumulate=[False])

    return forward, backward


def _copies(spec: ExpertSpec, dtype: torch.dtype, cold_bytes: int) -> int:
    """Of an expert's weights, for so much memory."""
    return max(2, min(MOST_COPIES, cold_bytes // (spec.numel * dtype.itemsize) + 1))


class LayersExperts:
    """An ``Interruption``: a layer's experts compute, as they do between any two dense parts where every micro-batch
    has its turn, and leave the caches as they do then. As many of them as fill those."""

    def __init__(
        self, spec: ExpertSpec, dtype: torch.dtype, *, num_tokens: int, saves: bool, activation_module: torch.nn.Module
    ) -> None:
        """``num_tokens``: of the layer; its experts are equally popular."""
        rows = max(1, num_tokens * spec.top_k // spec.num_experts)
        self._passes = one_expert(spec, dtype, num_tokens=rows, saves=saves, activation_module=activation_module)
        self._num_experts = min(spec.num_experts, -(-FORGOTTEN_BYTES // (spec.numel * dtype.itemsize)))
        self.spent_s = 0.0

    def __call__(self, *, is_backward: bool = False) -> None:
        start_s = time.perf_counter()
        for _ in range(self._num_experts):
            self._passes[is_backward]()
        self.spent_s += time.perf_counter() - start_s
