"""What a step has to compute, layer by layer, and how a layer's experts are divided between accelerator and CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from isthmus.planning.loading import unit_key
from isthmus.planning.problem import LayerProblem
from isthmus.simulation.tuning.costs import Costs, LayerCosts
from isthmus.spec.model import DENSE, UnitKey
from isthmus.spec.plan import Stage

FORWARD, BACKWARD = False, True


@dataclass(frozen=True, slots=True)
class Run:
    """One stage in one pass, on its device."""

    stage: int
    is_backward: bool
    layers: tuple[int, ...]
    """In the order of the pass."""


class Backlog(NamedTuple):
    """What one step leaves a device to do during the next one: (layer, seconds) by layer, gradients on their way to
    the host and the optimizer's steps. A layer's weights are neither loaded nor used before its step."""

    gradients: tuple[tuple[int, float], ...] = ()
    steps: tuple[tuple[int, float], ...] = ()


class Division:
    """Where the experts of a layer run, for one micro-batch of one pass."""

    __slots__ = ("accelerator_s", "cpu_rows", "cpu_s", "is_there", "keys", "num_rows", "on", "work")

    def __init__(self, layer: int, tables: LayerTables, on: Iterable[int], is_backward: bool) -> None:
        """``on``: experts on the accelerator; those without tokens may be among them."""
        work, cpu, tokens = tables.accelerator_s[is_backward], tables.cpu_s[is_backward], tables.tokens
        chosen = frozenset(on)
        self.on = [e for e in tables.by_work if e in chosen and tokens[e]]
        self.keys = [unit_key(layer, e) for e in self.on]
        self.work = [work[e] for e in self.on]
        self.is_there = False
        """All of ``keys`` have landed; set when it is found."""
        self.accelerator_s = sum(self.work)
        others = [e for e in tables.by_work if e not in chosen and tokens[e]]
        self.cpu_s = sum([cpu[e] for e in others])
        self.cpu_rows = sum([tokens[e] for e in others])
        self.num_rows = tables.num_rows


class LayerTables:
    """Seconds of one layer's experts at a step's counts, one micro-batch: lists by expert, forward then backward."""

    __slots__ = ("accelerator_s", "by_work", "costs", "counts", "cpu_s", "num_rows", "tokens")

    def __init__(self, costs: LayerCosts, counts_E: Sequence[float]) -> None:
        self.costs = costs
        self.counts = [float(count) for count in counts_E]
        self.tokens = [count / costs.num_parts for count in self.counts]
        self.num_rows = sum(self.tokens)
        self.by_work = sorted(range(len(self.tokens)), key=[-tokens for tokens in self.tokens].__getitem__)
        tokens = np.array(self.tokens)
        self.accelerator_s = tuple(
            costs.accelerator_s(tokens, is_backward=backward).tolist() for backward in (False, True)
        )
        self.cpu_s = tuple(costs.cpu_s(tokens, is_backward=backward).tolist() for backward in (False, True))

    def problem(self, is_backward: bool) -> LayerProblem:
        """As the split rules see the layer."""
        return self.costs.problem_of(
            self.counts, self.cpu_s[is_backward], self.accelerator_s[is_backward], is_backward=is_backward
        )


class StepWork:
    """A step's counts, priced, and the runs of every device."""

    def __init__(
        self, costs: Costs, stages: Sequence[Stage], order: Sequence[int], counts: Mapping[int, Sequence[float]]
    ):
        """``order``: device by position; stage ``s`` is on the device at position ``s`` mod their number (APTMoE,
        section 3). ``counts``: tokens (E,) of a whole step by MoE layer."""
        self.costs = costs
        self.stages = stages
        self.order = order
        self.num_micro_batches = costs.job.num_micro_batches
        self.device_of = [order[number % len(order)] for number in range(len(stages))]
        self.runs = runs_of(stages, self.device_of, len(order))
        self.counts = counts
        self.layer_device = {
            layer: self.device_of[number]
            for number, stage in enumerate(stages)
            for layer in range(stage.first_layer, stage.last_layer + 1)
        }
        self._costs_of = {layer: costs.layer(device, layer) for layer, device in self.layer_device.items()}
        self.tables = {layer: LayerTables(self._costs_of[layer], counts_E) for layer, counts_E in counts.items()}

    def layer_costs(self, layer: int) -> LayerCosts:
        return self._costs_of[layer]

    def dense_key(self, layer: int) -> UnitKey:
        return unit_key(layer, DENSE)

    def expert_keys(self, layer: int, experts: Iterable[int]) -> list[UnitKey]:
        return [unit_key(layer, expert) for expert in experts]


def runs_of(stages: Sequence[Stage], device_of: Sequence[int], num_devices: int) -> list[list[Run]]:
    """Of every device: its stages forward in their order, then backward the other way round."""
    runs: list[list[Run]] = [[] for _ in range(num_devices)]
    forward = [tuple(range(stage.first_layer, stage.last_layer + 1)) for stage in stages]
    for number, device in enumerate(device_of):
        runs[device].append(Run(number, FORWARD, forward[number]))
    for number in reversed(range(len(stages))):
        runs[device_of[number]].append(Run(number, BACKWARD, forward[number][::-1]))
    return runs
