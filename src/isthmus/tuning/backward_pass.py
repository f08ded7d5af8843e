"""Backward of one layer's routed experts for one wave of micro-batches.

With a separate accelerator only the gradients of the inputs are computed at once, since the layer before waits for
them. Weight gradients are left for when a side has nothing more urgent to do: on the CPU as tasks of lower priority, on
the accelerator as ``DeferredWork``. Grouped experts leave nothing: on a GPU they are bound by launches, not by idling.

Legend: ``T`` tokens of the wave, ``k`` choices per token, ``H`` hidden size, ``S`` routed pairs, see ``wave``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isthmus.models.expert_math import WeightWork
from isthmus.models.routing import combine, gather, weight_gradients_of
from isthmus.tuning.grouped import GroupedExperts
from isthmus.tuning.wave import WavePass


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
        if resources.grouped is not None:
            ready = self._in_groups(resources.grouped)
        else:
            ready = self.resident()
            self._on_accelerator(ready)
        self._late = self.without(ready)

    # --- on the CPU --------------------------------------------------------------------------------------------------

    def _start_cpu(self) -> None:
        rows, buffers, lend = slice(0, self.num_cpu_rows), self.resources.buffers, self.cpu.lend
        counts = self.counts(self.on_cpu)
        places = self.input_gradients_SH[rows], self.weight_gradients_S[rows]
        shape, dtype = tuple(places[0].shape), places[0].dtype
        result, gradients, inputs = lend(shape, dtype), lend(shape, dtype), buffers.take(shape, dtype)
        pair_weights, result_weights = (lend((self.num_cpu_rows,), places[1].dtype) for _ in range(2))
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
                self._submit(lambda expert=expert, work=work: weight_gradient(expert, work), work)

        def weight_gradient(expert: int, work: WeightWork) -> None:
            self._weight_gradient(expert, work, on_cpu=True)
            if expert == self.on_cpu[-1]:
                for buffer in (inputs, kept.pre_SP, kept.act_SI, kept.sg_SH):
                    buffers.give(buffer)

        moving = [(self.weights_S[rows], pair_weights), (self.inputs_SH[rows], inputs)]
        moving.append((self.gradients_SH[rows], gradients))
        self.cpu.start(moving, task, kind="expert_backward", num_tokens=self.num_cpu_rows, then=defer)

    def _submit(self, task: Callable[[], object], work: WeightWork) -> None:
        """After the next layer's input gradients, before those of the layer after that."""
        worker = self.resources.worker
        assert worker is not None
        worker.submit(
            task,
            priority=self.cpu.priority + 1.5,
            name=f"{self.name} weights",
            kind="expert_backward",
            num_tokens=work.x_NH.shape[0],
        )

    def _weight_gradient(self, expert: int, work: WeightWork, *, on_cpu: bool) -> None:
        gradients, key = self.resources.gradients, self.key(expert)
        flat, adds = gradients.open(key, on_cpu=on_cpu)
        self.math.weight_gradients(work, self.math.views(flat), accumulate=adds)
        gradients.close(key)

    # --- on the accelerator ------------------------------------------------------------------------------------------

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
            for expert in run.experts:
                gradients.close(self.key(expert))
            done += run.experts
        return done

    def _on_accelerator(self, experts: list[int]) -> None:
        compute = self._with_deferred_weights if self.resources.accelerator.is_separate else self._in_place
        for group in self.neighbours(experts):
            compute(group)

    def _with_deferred_weights(self, experts: list[int]) -> None:
        resources, math, rows = self.resources, self.math, self.rows_of(experts)
        keys = [self.key(expert) for expert in experts]
        flats = [resources.loader.acquire(key) for key in keys]
        resources.accelerator.require_resident(*flats)
        x_SH = self.inputs_SH[rows]
        with self.computing("expert_backward", experts):
            self.weight_gradients_S[rows], works = math.backward_inputs(
                [math.views(flat) for flat in flats],
                self.counts(experts),
                x_SH,
                self.weights_S[rows],
                self.gradients_SH[rows],
                math.weight_rows(x_SH.shape[0], x_SH.new_empty),
                dx_SH=self.input_gradients_SH[rows],
            )
        resources.loader.release(*keys)
        for expert, work in zip(experts, works, strict=True):
            resources.deferred.add(self.wave.layer, lambda expert=expert, work=work: self._deferred(expert, work))

    def _deferred(self, expert: int, work: WeightWork) -> None:
        with self.computing("expert_backward", [expert]):
            self._weight_gradient(expert, work, on_cpu=False)

    def _in_place(self, experts: list[int]) -> None:
        """All at once, from what forward kept: nobody else could compute meanwhile."""
        wave, resources, math, rows = self.wave, self.resources, self.math, self.rows_of(experts)
        keys = [self.key(expert) for expert in experts]
        places = [resources.gradients.open(key, on_cpu=False) for key in keys]
        with self.computing("expert_backward", experts):
            _, self.weight_gradients_S[rows] = math.backward_many(
                [math.views(resources.loader.acquire(key)) for key in keys],
                self.counts(experts),
                self.inputs_SH[rows],
                self.weights_S[rows],
                self.gradients_SH[rows],
                [wave.saved.pop(expert, None) for expert in experts],
                [math.views(flat) for flat, _ in places],
                accumulate=[adds for _, adds in places],
                dx_SH=self.input_gradients_SH[rows],
            )
        resources.loader.release(*keys)
        for key in keys:
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
        weights_gradient_Tk = weight_gradients_of(self.weight_gradients_S, self.routing, *wave.weights_Tk.shape)
        wave.saved.clear()
        parts = wave.part(weights_gradient_Tk)
        return list(zip(wave.part(hidden_gradient_TH), parts, strict=True))
