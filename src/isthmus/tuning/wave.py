"""The routed experts of one layer for one wave of micro-batches: some on the accelerator, the rest on the CPU, at once.

Legend: ``T`` tokens of the wave, ``k`` choices per token, ``H`` hidden size, ``S`` routed pairs (token, expert), sorted
so that the pairs of one expert lie together: first the CPU's experts, then the accelerator's.

Tokens travel, weights of CPU experts do not: the CPU's rows of the hidden states go to the host, its results come back
(APTMoE, section 4.1). Nothing but the hidden states, the routing and (optionally) the pre-activations is kept for
backward; the rest is recomputed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.models.expert_math import ExpertMath
from isthmus.models.routing import Routing, combine, count_by_expert, gather, sort_by_expert
from isthmus.spec.model import UnitKey
from isthmus.spec.plan import LayerSplit
from isthmus.tuning.accelerator.base import Accelerator
from isthmus.tuning.cpu_part import CpuPart
from isthmus.tuning.cpu_worker import CpuWorker
from isthmus.tuning.gradients import GradientSink
from isthmus.tuning.grouped import GroupedExperts
from isthmus.tuning.host_buffers import HostBuffers
from isthmus.tuning.parameter_store import ParameterStore
from isthmus.tuning.protocols import Loader
from isthmus.tuning.tape import ExpertsCall


@dataclass(slots=True)
class Resources:
    """What every wave works with. ``worker`` is None when there is no separate accelerator: all experts then run in
    place."""

    accelerator: Accelerator
    loader: Loader
    store: ParameterStore
    gradients: GradientSink
    buffers: HostBuffers
    worker: CpuWorker | None
    math: dict[int, ExpertMath]
    keep_activations: bool
    """Whether pre-activations are kept from forward for backward (else recomputed)."""
    grouped: GroupedExperts | None = None
    """Computes experts that are on the accelerator already, all at once; None: one after the other."""


@dataclass(slots=True)
class Wave:
    """The calls of some micro-batches to one layer's experts, concatenated."""

    layer: int
    calls: list[ExpertsCall]
    hidden_TH: Tensor
    index_Tk: Tensor
    weights_Tk: Tensor
    counts_E: list[int]
    saved: dict[tuple[int, bool], Tensor] = field(default_factory=dict)
    """(expert, on CPU) -> what forward kept for backward."""

    @classmethod
    def of(cls, calls: list[ExpertsCall], num_experts: int) -> Wave:
        """Merges the calls. Blocks on a GPU until the routing is known on the host: nothing else of a wave does."""

        def merge(parts: list[Tensor]) -> Tensor:
            parts = [part.detach() for part in parts]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        index_Tk = merge([call.index for call in calls])
        return cls(
            layer=calls[0].layer,
            calls=calls,
            hidden_TH=merge([call.hidden for call in calls]),
            index_Tk=index_Tk,
            weights_Tk=merge([call.weights for call in calls]),
            counts_E=count_by_expert(index_Tk, num_experts),
        )

    def part(self, rows_T: Tensor) -> list[Tensor]:
        """Splits rows of the wave (T, …) back into one tensor per call."""
        return list(rows_T.split([call.hidden.shape[0] for call in self.calls]))


class WavePass:
    """What forward and backward share: who computes which rows."""

    def __init__(self, resources: Resources, wave: Wave, split: LayerSplit, *, priority: float, name: str) -> None:
        self.resources = resources
        self.wave = wave
        self.math = resources.math[wave.layer]
        self.name = name
        counts = wave.counts_E
        self.on_cpu = [expert for expert in split.on_cpu if counts[expert]]
        self.on_accelerator = [expert for expert in split.on_accelerator if counts[expert]]
        if resources.grouped is not None:
            self.on_accelerator = resources.grouped.in_slot_order(wave.layer, self.on_accelerator)
        order = self.on_cpu + self.on_accelerator
        rank = torch.full((len(counts) + 1,), len(order), dtype=torch.int64)
        rank[order] = torch.arange(len(order))
        rank_Tk = rank.to(wave.index_Tk.device, non_blocking=True)[wave.index_Tk]
        self.routing: Routing = sort_by_expert(rank_Tk, len(order), [counts[expert] for expert in order])
        self.num_cpu_rows = sum(counts[expert] for expert in self.on_cpu)
        bounds = [0]
        for expert in order:
            bounds.append(bounds[-1] + counts[expert])
        self.rows = {expert: slice(bounds[i], bounds[i + 1]) for i, expert in enumerate(order)}
        self.weights_S = wave.weights_Tk.reshape(-1)[self.routing.order_S]
        accelerator, worker = resources.accelerator, resources.worker
        self.cpu = CpuPart(accelerator, worker, resources.buffers, priority=priority, name=name)

    def key(self, expert: int) -> UnitKey:
        return UnitKey(self.wave.layer, expert)

    def resident(self) -> list[int]:
        """The accelerator's experts that are there already."""
        return [expert for expert in self.on_accelerator if self.resources.loader.is_resident(self.key(expert))]

    def without(self, done: list[int]) -> list[int]:
        """The accelerator's other experts."""
        computed = set(done)
        return [expert for expert in self.on_accelerator if expert not in computed]

    def rows_of(self, experts: Sequence[int]) -> slice:
        """The rows of neighbouring experts."""
        return slice(self.rows[experts[0]].start, self.rows[experts[-1]].stop)

    def computing(self, kind: str, experts: Sequence[int]) -> AbstractContextManager[None]:
        """Marks compute of these experts on the accelerator's lane."""
        num_tokens = sum(self.wave.counts_E[expert] for expert in experts)
        return self.resources.accelerator.compute(self.name, kind=kind, num_tokens=num_tokens)


class ForwardPass(WavePass):
    """Forward of one wave. ``start`` queues and computes what can be; ``finish`` waits for the rest."""

    def start(self) -> None:
        wave, resources = self.wave, self.resources
        self.inputs_SH = gather(wave.hidden_TH, self.routing)
        self.outputs_SH = torch.empty_like(self.inputs_SH)
        if self.on_cpu:
            rows = slice(0, self.num_cpu_rows)
            place = self.outputs_SH[rows]
            result = self.cpu.lend(tuple(place.shape), place.dtype)

            def task(pair_weights: Tensor, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
                self._compute(self.on_cpu, inputs, pair_weights, result, on_cpu=True)
                return [(result, place)]

            travelling = [self.weights_S[rows], self.inputs_SH[rows]]
            self.cpu.start(travelling, task, kind="expert_forward", num_tokens=self.num_cpu_rows)
        if resources.grouped is not None:
            ready = self._in_groups(resources.grouped)
        else:
            ready = self.resident()
            self._on_accelerator(ready)
        self._late = self.without(ready)

    def _in_groups(self, grouped: GroupedExperts) -> list[int]:
        """Computes the experts that have landed; returns them."""
        layer, done = self.wave.layer, []
        for run in grouped.runs(layer, self.on_accelerator, self.wave.counts_E):
            rows = self.rows_of(run.experts)
            self.resources.accelerator.require_resident(*grouped.weights(layer, run))
            with self.computing("expert_forward", run.experts):
                grouped.forward(layer, run, self.inputs_SH[rows], self.weights_S[rows], self.outputs_SH[rows])
            done += run.experts
        return done

    def _on_accelerator(self, experts: list[int]) -> None:
        if not experts:
            return
        rows = self.rows_of(experts)
        if rows.stop - rows.start == sum(self.wave.counts_E[expert] for expert in experts):
            groups = [experts]
        else:
            groups = [[expert] for expert in experts]
        for group in groups:
            rows = self.rows_of(group)
            self._compute(group, self.inputs_SH[rows], self.weights_S[rows], self.outputs_SH[rows], on_cpu=False)

    def _compute(
        self, experts: list[int], inputs: Tensor, pair_weights: Tensor, result: Tensor, *, on_cpu: bool
    ) -> None:
        wave, resources = self.wave, self.resources
        counts = [wave.counts_E[expert] for expert in experts]
        keep = resources.keep_activations
        keys = [self.key(expert) for expert in experts]
        if on_cpu:
            weights = [resources.store.named(key) for key in keys]
            _, saved = self.math.forward_many(weights, counts, inputs, pair_weights, save=keep, out_SH=result)
        else:
            flats = [resources.loader.acquire(key) for key in keys]
            weights = [self.math.views(flat) for flat in flats]
            resources.accelerator.require_resident(*flats)
            with self.computing("expert_forward", experts):
                _, saved = self.math.forward_many(weights, counts, inputs, pair_weights, save=keep, out_SH=result)
            resources.loader.release(*keys)
        if keep and saved is not None:
            for expert, kept in zip(experts, saved, strict=True):
                wave.saved[expert, on_cpu] = kept

    def finish(self) -> list[Tensor]:
        """One output (T, H) per call. Blocks until the CPU's part and late loads are in."""
        for expert in self._late:
            self._on_accelerator([expert])
        self.cpu.join()
        wave = self.wave
        output_TH = combine(self.outputs_SH, self.routing, *wave.weights_Tk.shape)
        return wave.part(output_TH)


class BackwardPass(WavePass):
    """Backward of one wave, given d loss / d output."""

    def start(self, gradient_TH: Tensor) -> None:
        wave, resources = self.wave, self.resources
        self.inputs_SH = gather(wave.hidden_TH, self.routing)
        self.gradients_SH = gather(gradient_TH, self.routing)
        self.input_gradients_SH = torch.empty_like(self.inputs_SH)
        self.weight_gradients_S = torch.empty_like(self.weights_S)
        if self.on_cpu:
            rows = slice(0, self.num_cpu_rows)
            places = self.input_gradients_SH[rows], self.weight_gradients_S[rows]
            result, result_weights = (self.cpu.lend(tuple(place.shape), place.dtype) for place in places)

            def task(pair_weights: Tensor, inputs: Tensor, gradients: Tensor) -> list[tuple[Tensor, Tensor]]:
                self._compute(self.on_cpu, inputs, gradients, pair_weights, result, result_weights, on_cpu=True)
                return [(result, places[0]), (result_weights, places[1])]

            travelling = [self.weights_S[rows], self.inputs_SH[rows], self.gradients_SH[rows]]
            self.cpu.start(travelling, task, kind="expert_backward", num_tokens=self.num_cpu_rows)
        if resources.grouped is not None:
            ready = self._in_groups(resources.grouped)
        else:
            ready = self.resident()
            for expert in ready:
                self._on_accelerator(expert)
        self._late = self.without(ready)

    def _in_groups(self, grouped: GroupedExperts) -> list[int]:
        """Computes the experts that have landed; returns them."""
        layer, gradients, done = self.wave.layer, self.resources.gradients, []
        takes_slot = [not gradients.is_open(self.key(expert)) for expert in self.on_accelerator]
        for run in grouped.runs(layer, self.on_accelerator, self.wave.counts_E, takes_slot=takes_slot):
            places = [gradients.open(self.key(expert), on_cpu=False) for expert in run.experts]
            rows = self.rows_of(run.experts)
            self.resources.accelerator.require_resident(*grouped.weights(layer, run), *(flat for flat, _ in places))
            with self.computing("expert_backward", run.experts):
                self.weight_gradients_S[rows] = grouped.backward(
                    layer,
                    run,
                    self.inputs_SH[rows],
                    self.weights_S[rows],
                    self.gradients_SH[rows],
                    [self.math.views(flat) for flat, _ in places],
                    accumulate=[adds for _, adds in places],
                    dx_SH=self.input_gradients_SH[rows],
                )
            done += run.experts
        return done

    def _on_accelerator(self, expert: int) -> None:
        rows = self.rows[expert]
        self._compute(
            [expert],
            self.inputs_SH[rows],
            self.gradients_SH[rows],
            self.weights_S[rows],
            self.input_gradients_SH[rows],
            self.weight_gradients_S[rows],
            on_cpu=False,
        )

    def _compute(
        self,
        experts: list[int],
        inputs: Tensor,
        gradients: Tensor,
        pair_weights: Tensor,
        result: Tensor,
        result_weights: Tensor,
        *,
        on_cpu: bool,
    ) -> None:
        wave, resources, math = self.wave, self.resources, self.math
        counts = [wave.counts_E[expert] for expert in experts]
        keys = [self.key(expert) for expert in experts]
        places = [resources.gradients.open(key, on_cpu=on_cpu) for key in keys]
        saved = [wave.saved.pop((expert, on_cpu), None) for expert in experts]
        arguments = (counts, inputs, pair_weights, gradients, saved, [math.views(flat) for flat, _ in places])
        accumulate = [adds for _, adds in places]
        if on_cpu:
            weights = [resources.store.named(key) for key in keys]
            _, ds = math.backward_many(weights, *arguments, accumulate=accumulate, dx_SH=result)
        else:
            flats = [resources.loader.acquire(key) for key in keys]
            resources.accelerator.require_resident(*flats, *(flat for flat, _ in places))
            with self.computing("expert_backward", experts):
                _, ds = math.backward_many(
                    [math.views(flat) for flat in flats], *arguments, accumulate=accumulate, dx_SH=result
                )
            resources.loader.release(*keys)
        result_weights.copy_(ds)

    def finish(self) -> list[tuple[Tensor, Tensor]]:
        """(d hidden (T, H), d weights (T, k)) per call. Blocks like ``ForwardPass.finish``."""
        for expert in self._late:
            self._on_accelerator(expert)
        self.cpu.join()
        wave = self.wave
        hidden_gradient_TH = combine(self.input_gradients_SH, self.routing, *wave.weights_Tk.shape)
        weights_gradient = torch.zeros_like(wave.weights_Tk).reshape(-1)
        weights_gradient[self.routing.order_S] = self.weight_gradients_S
        wave.saved.clear()
        parts = wave.part(weights_gradient.reshape(wave.weights_Tk.shape))
        return list(zip(wave.part(hidden_gradient_TH), parts, strict=True))
