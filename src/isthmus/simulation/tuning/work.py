"""What a step has to compute, layer by layer, and how a layer's experts are divided between accelerator and CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np

from isthmus.planning.loading import expert_keys, unit_key
from isthmus.simulation.tuning.costs import Costs, LayerCosts
from isthmus.spec.model import UnitKey
from isthmus.spec.plan import Stage

FORWARD, BACKWARD = False, True


@dataclass(frozen=True, slots=True)
class Run:
    """One stage in one pass, on its device."""

    stage: int
    is_backward: bool
    layers: tuple[int, ...]
    """In the order of the pass."""


Backlog = tuple[tuple[int, float], ...]
"""What one step leaves a device to do during the next one: (layer, seconds) of the optimizer's steps. A layer's weights
are neither loaded nor used before its step."""


class Division:
    """Where the experts of a layer run, for one micro-batch of one pass."""

    __slots__ = (
        "accelerator_s",
        "cpu_rows",
        "cpu_s",
        "down_bytes",
        "down_s",
        "is_there",
        "keys",
        "num_cpu_tokens",
        "num_rows",
        "on",
        "up_bytes",
        "up_s",
        "work",
    )

    def __init__(self, layer: int, tables: LayerTables, on: Iterable[int], is_backward: bool) -> None:
        """``on``: experts on the accelerator; those without tokens may be among them."""
        work, cpu, tokens = tables.accelerator_s[is_backward], tables.cpu_s[is_backward], tables.tokens
        costs = tables.costs
        chosen = frozenset(on)
        self.on = [e for e in tables.used if e in chosen]
        self.keys = [*map(expert_keys(layer, len(tokens)).__getitem__, self.on)]
        self.work = [*map(work.__getitem__, self.on)]
        self.is_there = False
        """All of ``keys`` have landed; set when it is found."""
        self.accelerator_s = sum(self.work)
        others = [e for e in tables.used if e not in chosen]
        self.cpu_s = sum(map(cpu.__getitem__, others))
        self.cpu_rows = rows = sum(map(tokens.__getitem__, others))
        self.num_rows = tables.num_rows
        self.num_cpu_tokens = round(rows)
        down = rows * (2 if is_backward else 1)
        self.down_s, self.down_bytes = costs.copy_s + down * costs.row_d2h_s, round(down * costs.row_bytes)
        """What the CPU needs; in backward the rows and what their gradients are made of."""
        self.up_s, self.up_bytes = costs.copy_s + rows * costs.row_h2d_s, round(rows * costs.row_bytes)


class LayerTables:
    """Seconds of one layer's experts at a step's counts, one micro-batch: lists by expert, forward then backward."""

    __slots__ = ("accelerator_s", "by_work", "costs", "cpu_s", "num_rows", "tokens", "used")

    def __init__(
        self,
        costs: LayerCosts,
        tokens: list[float],
        by_work: list[int],
        accelerator_s: list[list[float]],
        cpu_s: list[list[float]],
    ) -> None:
        self.costs = costs
        self.tokens = tokens
        self.by_work = by_work
        self.used = [expert for expert in by_work if tokens[expert]]
        """Likewise, those with tokens."""
        # In the order in which parts of them are summed: none is more than all by rounding.
        self.num_rows = sum(map(tokens.__getitem__, self.used))
        self.accelerator_s = accelerator_s
        self.cpu_s = cpu_s


def alike(costs_of: Mapping[int, LayerCosts], layers: Iterable[int]) -> list[tuple[LayerCosts, list[int]]]:
    """``layers`` by what they cost."""
    found: dict[int, tuple[LayerCosts, list[int]]] = {}
    for layer in layers:
        costs = costs_of[layer]
        found.setdefault(id(costs), (costs, []))[1].append(layer)
    return list(found.values())


def tables_of(costs_of: Mapping[int, LayerCosts], counts: Mapping[int, Sequence[float]]) -> dict[int, LayerTables]:
    """Of all layers; those that cost alike are priced together."""
    found: dict[int, LayerTables] = {}
    for costs, layers in alike(costs_of, counts):
        tokens_LE = np.array([counts[layer] for layer in layers], dtype=np.float64) / costs.num_parts
        by_work_LE = np.argsort(-tokens_LE, axis=1, kind="stable")
        # (layer, pass, expert)
        accelerator_s, cpu_s = (
            np.stack([of(tokens_LE, is_backward=backward) for backward in (False, True)], axis=1).tolist()
            for of in (costs.accelerator_s, costs.cpu_s)
        )
        rows = zip(layers, tokens_LE.tolist(), by_work_LE.tolist(), accelerator_s, cpu_s, strict=True)
        for layer, *row in rows:
            found[layer] = LayerTables(costs, *row)
    return {layer: found[layer] for layer in counts}


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
        self.number_of_run = {
            (run.stage, run.is_backward): number for runs in self.runs for number, run in enumerate(runs)
        }
        """Among its device's runs, by stage and pass."""
        self.costs_of = {
            layer: costs.layer(self.device_of[number], layer)
            for number, stage in enumerate(stages)
            for layer in range(stage.first_layer, stage.last_layer + 1)
        }
        self.counts = counts
        self.tables = tables_of(self.costs_of, counts)

    def with_counts(self, counts: Mapping[int, Sequence[float]]) -> StepWork:
        """The same stages on the same devices in a step with other ``counts``."""
        other = copy(self)
        other.counts = counts
        other.tables = tables_of(self.costs_of, counts)
        return other

    def steps_after(self, device: int) -> Backlog:
        """The optimizer's steps of all layers on ``device``, none of which may begin before all gradients are there."""
        own = sorted({layer for run in self.runs[device] for layer in run.layers})
        return tuple((layer, self.costs_of[layer].optimizer_s) for layer in own)

    def alike(self, layers: Iterable[int]) -> list[tuple[LayerCosts, list[int]]]:
        """``layers`` by what they cost."""
        return alike(self.costs_of, layers)

    def layer_costs(self, layer: int) -> LayerCosts:
        return self.costs_of[layer]

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
