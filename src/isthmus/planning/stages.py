"""The layer-to-stage mapping: contiguous, balanced, two stages on the device at a time (APTMoE, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from isthmus.spec.errors import IsthmusError
from isthmus.spec.model import OUTER_LAYER, ModelSpec
from isthmus.spec.plan import Stage


def map_stages(spec: ModelSpec, *, num_slots: int, num_stages: int | None = None) -> tuple[Stage, ...]:
    """Cuts the layers into stages of as equal parameter numbers as can be, in execution order.

    ``num_stages`` None: the fewest such that the experts of any two neighbouring stages fit ``num_slots`` slots
    together (the running stage and the one being loaded), one layer per stage if even that is too much. Raises
    ``IsthmusError`` for more stages than layers or fewer than one.
    """
    if num_stages is not None and not 1 <= num_stages <= spec.num_layers:
        raise IsthmusError(
            f"num_stages: got {num_stages}, wanted 1 to {spec.num_layers}, the number of layers: a layer is never cut. "
            "Leave it out to have it chosen."
        )
    experts = [0 if layer is None else layer.num_experts for layer in spec.layers]
    weights = [spec.layer_numel(layer) for layer in range(spec.num_layers)]
    cuts = _BalancedCuts(weights)
    for number in range(1, spec.num_layers + 1) if num_stages is None else (num_stages,):
        bounds = cuts.bounds(number)
        held = [sum(experts[first:last]) for first, last in bounds]
        neighbours = [a + b for a, b in pairwise(held)] or held
        if num_stages is not None or max(neighbours) <= num_slots or number == spec.num_layers:
            return tuple(Stage(first_layer=first, last_layer=last - 1) for first, last in bounds)
    raise AssertionError("a model has at least one layer")


@dataclass(frozen=True, kw_only=True)
class Division:
    """Which of several processes has what: stage ``s`` is rank ``s mod num_ranks``'s, so neighbouring stages are on
    different ones (APTMoE, section 3); what lies outside every layer is rank 0's."""

    stages: tuple[Stage, ...]
    num_ranks: int
    order: tuple[int, ...] = ()
    """In which stages go round the ranks, from rank 0 on; empty: as they are numbered."""

    def __post_init__(self) -> None:
        if self.order and (sorted(self.order) != list(range(self.num_ranks)) or self.order[0]):
            raise ValueError(f"order: got {self.order}, wanted all of {self.num_ranks} ranks, rank 0 first")
        if len(self.stages) < self.num_ranks:
            raise IsthmusError(
                f"num_stages: got {len(self.stages)} for {self.num_ranks} processes, wanted at least one stage each: "
                "raise --num-stages (up to the number of layers) or start fewer processes."
            )

    def stages_of(self, rank: int) -> tuple[Stage, ...]:
        return self.stages[self._ranks.index(rank) :: self.num_ranks]

    @property
    def _ranks(self) -> tuple[int, ...]:
        return self.order or tuple(range(self.num_ranks))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each stage."""
        return tuple(self._ranks[number % self.num_ranks] for number in range(len(self.stages)))

    def layers_of(self, rank: int) -> tuple[int, ...]:
        return tuple(
            layer for stage in self.stages_of(rank) for layer in range(stage.first_layer, stage.last_layer + 1)
        )

    def rank_of(self, layer: int) -> int:
        """Raises ``ValueError`` for a layer that no stage has."""
        if layer == OUTER_LAYER:
            return 0
        for number, stage in enumerate(self.stages):
            if stage.first_layer <= layer <= stage.last_layer:
                return self.ranks[number]
        raise ValueError(f"layer: got {layer}, wanted one up to {self.stages[-1].last_layer}")


def divide(spec: ModelSpec, *, num_ranks: int, num_stages: int | None = None) -> Division:
    """Stages for several processes. ``num_stages`` None: two for each where there are enough layers, so that one can be
    loaded while the other runs. Raises ``IsthmusError`` for more stages than layers or fewer than processes."""
    if num_stages is None:
        num_stages = 2 * num_ranks if spec.num_layers >= 2 * num_ranks else min(num_ranks, spec.num_layers)
    return Division(stages=map_stages(spec, num_slots=0, num_stages=num_stages), num_ranks=num_ranks)


class _BalancedCuts:
    """Contiguous parts with the least sum of squared weights, by dynamic programming, one more part at a time."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._sums = np.concatenate([[0.0], np.cumsum(np.asarray(weights, dtype=np.float64))])
        self._sums /= max(self._sums[-1], 1.0)
        num = len(weights)
        self._best = np.full(num + 1, np.inf)
        self._best[0] = 0.0
        self._cuts: list[list[int]] = []

    def bounds(self, num_parts: int) -> list[tuple[int, int]]:
        """(first, one past last) of every part, none empty. Ties go to larger parts at the front."""
        num = len(self._sums) - 1
        while len(self._cuts) < num_parts:
            cost, cuts = np.full(num + 1, np.inf), [0] * (num + 1)
            for last in range(len(self._cuts) + 1, num + 1):
                total = self._best[:last] + (self._sums[last] - self._sums[:last]) ** 2
                cuts[last] = int(np.flatnonzero(total <= total.min() * (1 + 1e-12))[-1])
                cost[last] = total[cuts[last]]
            self._best = cost
            self._cuts.append(cuts)
        bounds, last = [], num
        for cuts in reversed(self._cuts[:num_parts]):
            bounds.append((cuts[last], last))
            last = cuts[last]
        return bounds[::-1]
