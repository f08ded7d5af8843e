"""The routed experts of one layer for one wave of micro-batches: some on the accelerator, the rest on the CPU, at once.

Legend: ``T`` tokens of the wave, ``k`` choices per token, ``H`` hidden size, ``S`` routed pairs (token, expert), sorted
so that the pairs of one expert lie together: first the CPU's experts, then the accelerator's.

Tokens travel, weights of CPU experts do not: the CPU's rows of the hidden states go to the host, its results come back
(APTMoE, section 4.1). Nothing but the hidden states, the routing and (optionally) the pre-activations is kept for
backward; the rest is recomputed there. With a separate accelerator, weight gradients are left for when a side has
nothing more urgent to do: only the gradients of the inputs are waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.models.expert_math import ExpertMath, WeightWork
from isthmus.models.routing import Routing, combine, gather, sort_by_expert
from isthmus.spec.model import UnitKey
from isthmus.spec.plan import LayerSplit
from isthmus.tuning.accelerator.base import Accelerator, Event
from isthmus.tuning.cpu_worker import CpuWorker
from isthmus.tuning.deferred import DeferredWork
from isthmus.tuning.gradients import GradientSink
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
    deferred: DeferredWork
    keep_activations: bool
    """Whether pre-activations are kept from forward for backward (else recomputed)."""


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
        """Merges the calls. Blocks on a GPU until the routing is known on the host."""

        def merge(parts: list[Tensor]) -> Tensor:
            parts = [part.detach() for part in parts]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        index_Tk = merge([call.index for call in calls])
        counts_E = torch.bincount(index_Tk.reshape(-1), minlength=num_experts + 1)[:num_experts].tolist()
        return cls(
            layer=calls[0].layer,
            calls=calls,
            hidden_TH=merge([call.hidden for call in calls]),
            index_Tk=index_Tk,
            weights_Tk=merge([call.weights for call in calls]),
            counts_E=counts_E,
        )

    def part(self, rows_T: Tensor) -> list[Tensor]:
        """Splits rows of the wave (T, …) back into one tensor per call."""
        return list(rows_T.split([call.hidden.shape[0] for call in self.calls]))


class WavePass:
    """What forward and backward share: who computes which rows, and the way of the CPU's rows to the host and back."""

    def __init__(self, resources: Resources, wave: Wave, split: LayerSplit, *, priority: float, name: str) -> None:
        self.resources = resources
        self.wave = wave
        self.math = resources.math[wave.layer]
        self.priority = priority
        self.name = name
        counts = wave.counts_E
        self.on_cpu = [expert for expert in split.on_cpu if counts[expert]]
        self.on_accelerator = [expert for expert in split.on_accelerator if counts[expert]]
        order = self.on_cpu + self.on_accelerator
        rank = torch.full((len(counts) + 1,), len(order), dtype=torch.int64)
        rank[order] = torch.arange(len(order))
        self.routing: Routing = sort_by_expert(rank.to(wave.index_Tk.device)[wave.index_Tk], len(order))
        self.num_cpu_rows = sum(counts[expert] for expert in self.on_cpu)
        bounds = [0]
        for expert in order:
            bounds.append(bounds[-1] + counts[expert])
        self.rows = {expert: slice(bounds[i], bounds[i + 1]) for i, expert in enumerate(order)}
        self.weights_S = wave.weights_Tk.reshape(-1)[self.routing.order_S]
        self._cpu: Future | None = None
        self._landed: Event | None = None
        self._lent: list[Tensor] = []
        self._kept: list[Tensor] = []

    def key(self, expert: int) -> UnitKey:
        return UnitKey(self.wave.layer, expert)

    def start_cpu(
        self,
        rows: Sequence[tuple[Tensor, Tensor]],
        task: Callable[[], list[tuple[Tensor, Tensor]]],
        *,
        kind: str,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Brings ``rows``, (on the accelerator, host buffer) pairs, to the host and then runs ``task()`` on the CPU.

        ``task`` returns (host result, its place on the accelerator) pairs, which then travel back; afterwards
        ``then()`` runs. Does not block.
        """
        resources = self.resources
        worker, accelerator = resources.worker, resources.accelerator
        assert worker is not None
        free = accelerator.record()
        done = self._cpu = Future()
        self._kept = [part for part, _ in rows]

        def run() -> None:
            for event in arrived:
                event.wait()
            for host, place in task():
                self._landed = accelerator.copy(
                    place, host, "h2d", name=f"{self.name} results", kind="tokens", after=free, is_urgent=True
                )
            then()

        def submit() -> None:
            try:
                inner = worker.submit(
                    run, priority=self.priority, name=self.name, kind=kind, num_tokens=self.num_cpu_rows
                )
                inner.add_done_callback(lambda future: _pass_on(future, done))
            except BaseException as error:
                done.set_exception(error)
                raise

        arrived: list[Event] = []
        # Copies of one direction end in order: the last one's end says that all have arrived.
        for number, (part, host) in enumerate(rows):
            is_last = number == len(rows) - 1
            event = accelerator.copy(
                host,
                part,
                "d2h",
                name=f"{self.name} tokens",
                kind="tokens",
                after=free,
                is_urgent=True,
                on_done=submit if is_last else None,
            )
            arrived.append(event)

    def rows_of(self, experts: list[int]) -> slice:
        """The rows of neighbours."""
        return slice(self.rows[experts[0]].start, self.rows[experts[-1]].stop)

    def neighbours(self, experts: list[int]) -> list[list[int]]:
        """All in one group where their rows lie together, else each by itself."""
        if not experts:
            return []
        rows = self.rows_of(experts)
        is_whole = rows.stop - rows.start == sum(self.wave.counts_E[expert] for expert in experts)
        return [experts] if is_whole else [[expert] for expert in experts]

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A host buffer until the pass is joined."""
        buffer = self.resources.buffers.take(shape, dtype)
        self._lent.append(buffer)
        return buffer

    def join_cpu(self) -> None:
        """Makes compute wait for the CPU's part. Blocks until the CPU has ended; does deferred work meanwhile."""
        if self._cpu is None:
            return
        resources = self.resources
        resources.deferred.run_until(self._cpu.done)
        recorder = resources.accelerator.recorder
        start_s = recorder.now_s()
        self._cpu.result()
        if recorder.now_s() - start_s > 50e-6:
            recorder.add("accelerator", f"{self.name}: CPU experts", start_s, recorder.now_s(), kind="wait")
        assert self._landed is not None
        resources.accelerator.wait_for(self._landed)
        self._landed.wait()
        for buffer in self._lent:
            resources.buffers.give(buffer)
        self._lent, self._kept, self._cpu = [], [], None


class ForwardPass(WavePass):
    """Forward of one wave. ``start`` queues and computes what can be; ``finish`` waits for the rest."""

    def start(self) -> None:
        wave, resources = self.wave, self.resources
        self.inputs_SH = gather(wave.hidden_TH, self.routing)
        self.outputs_SH = torch.empty_like(self.inputs_SH)
        if self.on_cpu:
            rows = slice(0, self.num_cpu_rows)
            pair_weights = self.weights_S[rows].to("cpu")
            place = self.outputs_SH[rows]
            inputs, result = (self.lend(tuple(place.shape), place.dtype) for _ in range(2))

            def task() -> list[tuple[Tensor, Tensor]]:
                self._compute(self.on_cpu, inputs, pair_weights, result, on_cpu=True)
                return [(result, place)]

            self.start_cpu([(self.inputs_SH[rows], inputs)], task, kind="expert_forward")
        ready = [expert for expert in self.on_accelerator if resources.loader.is_resident(self.key(expert))]
        self._on_accelerator(ready)
        self._late = [expert for expert in self.on_accelerator if expert not in set(ready)]

    def _on_accelerator(self, experts: list[int]) -> None:
        for group in self.neighbours(experts):
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
            if resources.accelerator.is_separate:
                resources.accelerator.require_resident(*flats)
            with resources.accelerator.compute(self.name, kind="expert_forward", num_tokens=sum(counts)):
                _, saved = self.math.forward_many(weights, counts, inputs, pair_weights, save=keep, out_SH=result)
            for key in keys:
                resources.loader.release(key)
        if keep and saved is not None:
            for expert, kept in zip(experts, saved, strict=True):
                wave.saved[expert, on_cpu] = kept

    def finish(self) -> list[Tensor]:
        """One output (T, H) per call. Blocks until the CPU's part and late loads are in."""
        for expert in self._late:
            self._on_accelerator([expert])
        self.join_cpu()
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
            self._start_cpu()
        ready = [expert for expert in self.on_accelerator if resources.loader.is_resident(self.key(expert))]
        self._on_accelerator(ready)
        self._late = [expert for expert in self.on_accelerator if expert not in set(ready)]

    def _start_cpu(self) -> None:
        """The CPU's rows: input gradients as soon as they are on the host, weight gradients when nothing is more
        urgent."""
        rows, buffers = slice(0, self.num_cpu_rows), self.resources.buffers
        counts = [self.wave.counts_E[expert] for expert in self.on_cpu]
        pair_weights = self.weights_S[rows].to("cpu")
        places = self.input_gradients_SH[rows], self.weight_gradients_S[rows]
        result, result_weights = (self.lend(tuple(place.shape), place.dtype) for place in places)
        shape, dtype = tuple(places[0].shape), places[0].dtype
        gradients, inputs = self.lend(shape, dtype), buffers.take(shape, dtype)
        kept = self.math.weight_rows(self.num_cpu_rows, lambda shape: buffers.take(shape, dtype))
        works: list[WeightWork] = []

        def task() -> list[tuple[Tensor, Tensor]]:
            weights = [self.resources.store.named(self.key(expert)) for expert in self.on_cpu]
            ds, found = self.math.backward_inputs(weights, counts, inputs, pair_weights, gradients, kept, dx_SH=result)
            result_weights.copy_(ds)
            works.extend(found)
            return [(result, places[0]), (result_weights, places[1])]

        def defer() -> None:
            for expert, work in zip(self.on_cpu, works, strict=True):
                self._submit(lambda expert=expert, work=work: self._weight_gradient(expert, work, on_cpu=True), work)
            self._submit(lambda: [buffers.give(part) for part in (inputs, kept.pre_SP, kept.act_SI, kept.sg_SH)], None)

        moving = [(self.inputs_SH[rows], inputs), (self.gradients_SH[rows], gradients)]
        self.start_cpu(moving, task, kind="expert_backward", then=defer)

    def _submit(self, task: Callable[[], object], work: WeightWork | None) -> None:
        """After the next layer's input gradients, before those of the layer after that."""
        worker = self.resources.worker
        assert worker is not None
        num_tokens = 0 if work is None else work.x_NH.shape[0]
        worker.submit(
            task,
            priority=self.priority + 1.5,
            name=f"{self.name} weights",
            kind="expert_backward",
            num_tokens=num_tokens,
        )

    def _weight_gradient(self, expert: int, work: WeightWork, *, on_cpu: bool) -> None:
        gradients, key = self.resources.gradients, self.key(expert)
        flat, adds = gradients.open(key, on_cpu=on_cpu)
        self.math.weight_gradients(work, self.math.views(flat), accumulate=adds)
        gradients.close(key)

    def _on_accelerator(self, experts: list[int]) -> None:
        compute = self._with_deferred_weights if self.resources.accelerator.is_separate else self._in_place
        for group in self.neighbours(experts):
            compute(group, self.rows_of(group))

    def _with_deferred_weights(self, experts: list[int], rows: slice) -> None:
        resources, math = self.resources, self.math
        counts = [self.wave.counts_E[expert] for expert in experts]
        flats = [resources.loader.acquire(self.key(expert)) for expert in experts]
        resources.accelerator.require_resident(*flats)
        x_SH = self.inputs_SH[rows]
        with self._compute(sum(counts)):
            self.weight_gradients_S[rows], works = math.backward_inputs(
                [math.views(flat) for flat in flats],
                counts,
                x_SH,
                self.weights_S[rows],
                self.gradients_SH[rows],
                math.weight_rows(x_SH.shape[0], x_SH.new_empty),
                dx_SH=self.input_gradients_SH[rows],
            )
        for expert, work in zip(experts, works, strict=True):
            resources.loader.release(self.key(expert))
            resources.deferred.add(self.wave.layer, lambda expert=expert, work=work: self._deferred(expert, work))

    def _deferred(self, expert: int, work: WeightWork) -> None:
        with self._compute(work.x_NH.shape[0]):
            self._weight_gradient(expert, work, on_cpu=False)

    def _compute(self, num_tokens: int) -> AbstractContextManager[None]:
        return self.resources.accelerator.compute(self.name, kind="expert_backward", num_tokens=num_tokens)

    def _in_place(self, experts: list[int], rows: slice) -> None:
        """All at once, from what forward kept: nobody else could compute meanwhile."""
        wave, resources, math = self.wave, self.resources, self.math
        keys = [self.key(expert) for expert in experts]
        places = [resources.gradients.open(key, on_cpu=False) for key in keys]
        with self._compute(rows.stop - rows.start):
            _, self.weight_gradients_S[rows] = math.backward_many(
                [math.views(resources.loader.acquire(key)) for key in keys],
                [wave.counts_E[expert] for expert in experts],
                self.inputs_SH[rows],
                self.weights_S[rows],
                self.gradients_SH[rows],
                [wave.saved.pop((expert, False), None) for expert in experts],
                [math.views(flat) for flat, _ in places],
                accumulate=[adds for _, adds in places],
                dx_SH=self.input_gradients_SH[rows],
            )
        for key in keys:
            resources.loader.release(key)
            resources.gradients.close(key)

    def finish(self) -> list[tuple[Tensor, Tensor]]:
        """(d hidden (T, H), d weights (T, k)) per call. Blocks like ``ForwardPass.finish``."""
        resources = self.resources
        for expert in self._late:
            resources.deferred.run_until(lambda expert=expert: resources.loader.is_resident(self.key(expert)))
            self._on_accelerator([expert])
        self.join_cpu()
        wave = self.wave
        hidden_gradient_TH = combine(self.input_gradients_SH, self.routing, *wave.weights_Tk.shape)
        weights_gradient = torch.zeros_like(wave.weights_Tk).reshape(-1)
        weights_gradient[self.routing.order_S] = self.weight_gradients_S
        wave.saved.clear()
        parts = wave.part(weights_gradient.reshape(wave.weights_Tk.shape))
        return list(zip(wave.part(hidden_gradient_TH), parts, strict=True))


def _pass_on(inner: Future, outer: Future) -> None:
    error = CancelledError() if inner.cancelled() else inner.exception()
    if error is not None:
        outer.set_exception(error)
    else:
        outer.set_result(None)
