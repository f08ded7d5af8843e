"""The routed experts of one layer for one wave of micro-batches: some on the accelerator, the rest on the CPU, at once.

Legend: ``T`` tokens of the wave, ``k`` choices per token, ``H`` hidden size, ``S`` routed pairs (token, expert), sorted
so that the pairs of one expert lie together: first the CPU's experts, then the accelerator's.

Tokens travel, weights of CPU experts do not: the CPU's rows of the hidden states go to the host, its results come back
(APTMoE, section 4.1). Nothing but the hidden states, the routing and (optionally) the pre-activations is kept for
backward; the rest is recomputed there. This module owns what forward and backward share; they are in
``forward_pass`` and ``backward_pass``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from isthmus.models.expert_math import ExpertMath
from isthmus.models.routing import Routing, count_by_expert, pad_rows, sort_by_expert, weights_of
from isthmus.spec.model import UnitKey
from isthmus.spec.plan import LayerSplit
from isthmus.tuning.accelerator.base import Accelerator
from isthmus.tuning.cpu_part import CpuPart
from isthmus.tuning.cpu_worker import CpuWorker
from isthmus.tuning.deferred import DeferredWork
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
    deferred: DeferredWork
    row_multiple: int = 1
    """Every expert's rows are filled up to a multiple of this."""
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
    saved: dict[int, Tensor] = field(default_factory=dict)
    """The pre-activations of each expert that forward kept for backward: in place only, else they are recomputed."""

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
        self.routing = pad_rows(self.routing, resources.row_multiple)
        bounds = [0, *accumulate(self.routing.counts_E)]
        self.num_cpu_rows = bounds[len(self.on_cpu)]
        self.rows = {expert: slice(bounds[i], bounds[i + 1]) for i, expert in enumerate(order)}
        self.weights_S = weights_of(wave.weights_Tk, self.routing)
        accelerator, worker = resources.accelerator, resources.worker
        self.cpu = CpuPart(accelerator, worker, resources.buffers, priority=priority, name=name)
        self._late: list[int] = []
        """Of the accelerator's experts those that had not landed when the rest was computed."""

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

    def counts(self, experts: Sequence[int]) -> list[int]:
        """Rows of each of the experts."""
        return [self.rows[expert].stop - self.rows[expert].start for expert in experts]

    def neighbours(self, experts: list[int]) -> list[list[int]]:
        """All in one group where their rows lie together, else each by itself."""
        if not experts:
            return []
        rows = self.rows_of(experts)
        is_whole = rows.stop - rows.start == sum(self.counts(experts))
        return [experts] if is_whole else [[expert] for expert in experts]

    def is_ready(self) -> bool:
        """Whether all that ``finish`` needs is there."""
        is_resident = self.resources.loader.is_resident
        return self.cpu.is_done() and all(is_resident(self.key(expert)) for expert in self._late)

    def join_cpu(self) -> None:
        """Makes compute wait for the CPU's part. Blocks until the CPU has ended; does deferred work meanwhile."""
        self.resources.deferred.run_until(self.cpu.is_done)
        self.cpu.join()

    def computing(self, kind: str, experts: Sequence[int]) -> AbstractContextManager[None]:
        """Marks compute of these experts on the accelerator's lane."""
        num_tokens = sum(self.wave.counts_E[expert] for expert in experts)
        return self.resources.accelerator.compute(self.name, kind=kind, num_tokens=num_tokens)
