"""Seconds that a wave takes beside its experts' arithmetic: merging its calls, sorting their rows by expert, bringing
them together and back, looking up weights and gradients. Measured with the passes that the engine runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from isthmus.models.expert_math import ExpertMath
from isthmus.planning.curves import monotone
from isthmus.profiling.crowding import Interruption, usual_s
from isthmus.profiling.timing import token_grid
from isthmus.reporting.recorder import Recorder
from isthmus.spec.model import ExpertSpec, UnitKey
from isthmus.spec.plan import LayerSplit
from isthmus.spec.profile import Curve
from isthmus.tuning.accelerator.host import HostAccelerator
from isthmus.tuning.backward_pass import BackwardPass
from isthmus.tuning.deferred import DeferredWork
from isthmus.tuning.forward_pass import ForwardPass
from isthmus.tuning.gradients import GradientSink
from isthmus.tuning.host_buffers import HostBuffers
from isthmus.tuning.loading import HostLoader
from isthmus.tuning.tape import ExpertsCall
from isthmus.tuning.wave import Resources, Wave

LAYER = 0
"""As which the measured layer is known here."""
MANY_WAVES = 1 << 40
"""More than will be measured: no gradient is ever complete."""


def measure_routing(
    spec: ExpertSpec,
    experts: nn.Module,
    dtype: torch.dtype,
    *,
    device: torch.device,
    max_tokens: int,
    interrupt: Interruption,
    synchronize: Callable[[], None] = lambda: None,
) -> tuple[Curve, Curve]:
    """(forward, backward) curves of one layer's wave of up to ``max_tokens`` tokens (not rows), all experts being in
    place and equally popular. ``interrupt``: comes before and where experts would compute. From the calling thread.
    Blocks for seconds."""
    split = LayerSplit(on_accelerator=tuple(range(spec.num_experts)), on_cpu=())
    # On a GPU what comes in the middle would hide what was launched before.
    between = interrupt if device.type == "cpu" else None
    with HostAccelerator(budget_bytes=1 << 60, recorder=Recorder(enabled=False)) as accelerator:
        resources = _resources(spec, _IdleMath(spec, experts, between), dtype, accelerator)
        grid = token_grid(max_tokens)[4::2] or [max_tokens]

        def call(count: int) -> ExpertsCall:
            index_Tk = torch.rand(count, spec.num_experts, device=device).topk(spec.top_k).indices
            hidden_TH = torch.randn(count, spec.hidden_size).to(device, dtype)
            return ExpertsCall(LAYER, experts, hidden_TH, index_Tk, torch.rand(count, spec.top_k, device=device))

        def forward(count: int) -> Callable[[], object]:
            calls = [call(count)]

            def run() -> None:
                wave = Wave.of(calls, spec.num_experts)
                work = ForwardPass(resources, wave, split, priority=0.0, name="")
                work.start()
                work.finish()
                synchronize()

            return run

        def backward(count: int) -> Callable[[], object]:
            wave = Wave.of([call(count)], spec.num_experts)

            def run() -> None:
                work = BackwardPass(resources, wave, split, priority=0.0, name="")
                work.start(torch.cat([wave.hidden_TH]))
                work.finish()
                synchronize()

            return run

        return _usual_curve(forward, grid, interrupt), _usual_curve(backward, grid, interrupt)


def _usual_curve(task: Callable[[int], Callable[[], object]], grid: Sequence[int], interrupt: Interruption) -> Curve:
    return monotone(Curve(num_tokens=tuple(grid), seconds=tuple(usual_s(task(count), interrupt) for count in grid)))


class _IdleMath(ExpertMath):
    """Computes nothing, in no time; where experts would compute, ``between`` comes."""

    def __init__(self, spec: ExpertSpec, experts: nn.Module, between: Interruption | None) -> None:
        super().__init__(spec, experts)
        self._between = between

    def forward_many(self, weights: Any, counts: Any, x_SH: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        if self._between is not None:
            self._between()
        return x_SH, None

    def backward_many(
        self, weights: Any, counts: Any, x_SH: Tensor, s_S: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if self._between is not None:
            self._between(is_backward=True)
        return x_SH, s_S


def _resources(spec: ExpertSpec, math: ExpertMath, dtype: torch.dtype, accelerator: HostAccelerator) -> Resources:
    """What a wave in place works with. Weights and gradients have no memory."""

    @cache
    def flat(key: UnitKey) -> Tensor:
        return torch.empty(spec.numel, dtype=dtype, device="meta")

    optimizer: Any = SimpleNamespace(gradient_destination=lambda key: (flat(key), True))
    loader, unused = HostLoader(flat), cast(Any, None)
    gradients = GradientSink(accelerator, loader, optimizer, lambda key: None)
    gradients.expect({UnitKey(LAYER, expert): MANY_WAVES for expert in range(spec.num_experts)})
    return Resources(
        accelerator=accelerator,
        loader=loader,
        store=unused,
        gradients=gradients,
        buffers=HostBuffers(accelerator.allocate_host),
        worker=None,
        math={LAYER: math},
        deferred=DeferredWork(),
    )
