"""Forward of one layer's routed experts for one wave of micro-batches.

Legend: ``T`` tokens of the wave, ``H`` hidden size, ``S`` routed pairs, see ``wave``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.models.routing import combine, gather
from isthmus.tuning.grouped import GroupedExperts
from isthmus.tuning.wave import WavePass


class ForwardPass(WavePass):
    """Forward of one wave. ``start`` queues and computes what can be; ``finish`` waits for the rest."""

    def start(self) -> None:
        wave, resources = self.wave, self.resources
        self.inputs_SH = gather(wave.hidden_TH, self.routing)
        self.outputs_SH = torch.empty_like(self.inputs_SH)
        if self.on_cpu:
            rows = slice(0, self.num_cpu_rows)
            place = self.outputs_SH[rows]
            inputs, result = (self.cpu.lend(tuple(place.shape), place.dtype) for _ in range(2))
            pair_weights = self.cpu.lend((self.num_cpu_rows,), self.weights_S.dtype)

            def task() -> list[tuple[Tensor, Tensor]]:
                weights = [resources.store.named(self.key(expert)) for expert in self.on_cpu]
                counts = self.counts(self.on_cpu)
                self.math.forward_many(weights, counts, inputs, pair_weights, save=False, out_SH=result)
                return [(result, place)]

            travelling = [(self.weights_S[rows], pair_weights), (self.inputs_SH[rows], inputs)]
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
        wave, resources, math = self.wave, self.resources, self.math
        save = not resources.accelerator.is_separate
        for group in self.neighbours(experts):
            rows, keys = self.rows_of(group), [self.key(expert) for expert in group]
            flats = [resources.loader.acquire(key) for key in keys]
            resources.accelerator.require_resident(*flats)
            with self.computing("expert_forward", group):
                _, saved = math.forward_many(
                    [math.views(flat) for flat in flats],
                    self.counts(group),
                    self.inputs_SH[rows],
                    self.weights_S[rows],
                    save=save,
                    out_SH=self.outputs_SH[rows],
                )
            resources.loader.release(*keys)
            if saved is not None:
                wave.saved.update(zip(group, saved, strict=True))

    def finish(self) -> list[Tensor]:
        """One output (T, H) per call. Blocks until the CPU's part and late loads are in."""
        for expert in self._late:
            self._on_accelerator([expert])
        self.join_cpu()
        wave = self.wave
        output_TH = combine(self.outputs_SH, self.routing, *wave.weights_Tk.shape)
        return wave.part(output_TH)
