"""Our policy in the simulator: plans are made by the runtime's split rule for several worths of link time, every one is
played through at the counts that are expected, and the fastest is taken.

A layer's split depends on what a second of link time is worth: little where loads hide behind other stages' work, much
where the link is what all wait for (``planning/affinity.py``). One factor per pass is searched over a grid, then
factors of single rounds over the devices are tried. Mobius' and the published rule's schedules are always among the
candidates, so for the counts it was made for a plan is never slower than either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from isthmus.planning.affinity import affinity
from isthmus.simulation.tuning.costs import LayerCosts
from isthmus.simulation.tuning.pipeline import simulate_step
from isthmus.simulation.tuning.policies import Aptmoe, Counts, Mobius, Planned, StepPolicy
from isthmus.simulation.tuning.work import BACKWARD, FORWARD, StepWork

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5)
"""What a second of link time counts for; 0: everything is loaded unless the accelerator is what all wait for."""
STEPS = (0.6, 1.6)
"""By which factors are multiplied when single ones are tried."""
MAX_ROUNDS = 2

Factors = dict[tuple[int, bool], float]
"""By (round over the devices, is_backward)."""
PlanOf = dict[tuple[int, bool], list[int]]


@dataclass(frozen=True)
class Choice:
    """The fastest candidate. ``make``: the policy for a step's real work."""

    make: Callable[[StepWork, Counts], StepPolicy]
    name: str
    predicted_s: float
    num_tried: int


class Planner:
    """Plans for expected counts, and remembers the splits it has made: layers with the same counts in another order
    have the same split."""

    def __init__(self, work: StepWork) -> None:
        """``work``: a step with the expected counts."""
        self._work = work
        self._splits: dict[object, frozenset[int]] = {}
        num_devices = len(work.order)
        self._round_of = {
            layer: number // num_devices
            for number, stage in enumerate(work.stages)
            for layer in range(stage.first_layer, stage.last_layer + 1)
        }
        self._num_rounds = -(-len(work.stages) // num_devices)
        self._num_tried = 0

    def choose(self) -> Choice:
        counts = self._work.counts
        best = Choice(Mobius, "mobius", self._seconds(Mobius(self._work, counts)), 1)
        best = self._better(best, Aptmoe, "aptmoe")
        found: Factors = {}
        for common in FACTORS:
            factors = {(number, backward): common for number in range(self._num_rounds) for backward in (False, True)}
            tried = self._offer(best, factors)
            if tried is not best or not found:
                best, found = tried, factors
        return self._refine(best, found)

    def _refine(self, best: Choice, found: Factors) -> Choice:
        """A pass at a time, then a round of a pass at a time."""
        groups = [[key for key in found if key[1] == backward] for backward in (BACKWARD, FORWARD)]
        groups += [[key] for key in found] if self._num_rounds > 1 else []
        for _ in range(MAX_ROUNDS):
            before = best
            for group in groups:
                for step in STEPS:
                    moved = found | {key: max(found[key], 0.2) * step for key in group}
                    tried = self._offer(best, moved)
                    if tried is not best:
                        best, found = tried, moved
                        break
            if best is before:
                break
        return replace(best, num_tried=self._num_tried)

    def _better(self, best: Choice, make: Callable[[StepWork, Counts], StepPolicy], name: str) -> Choice:
        seconds = self._seconds(make(self._work, self._work.counts))
        return Choice(make, name, seconds, 0) if seconds < best.predicted_s * (1 - 1e-9) else best

    def _offer(self, best: Choice, factors: Factors) -> Choice:
        plan = self.plan(factors)
        typical = sorted(factors.values())[len(factors) // 2]

        def make(work: StepWork, expected: Counts) -> StepPolicy:
            return Planned(work, expected, plan, typical)

        return self._better(best, make, "split " + ", ".join(f"{factor:.2g}" for factor in factors.values()))

    def _seconds(self, policy: StepPolicy) -> float:
        self._num_tried += 1
        return simulate_step(self._work, policy).seconds

    def plan(self, factors: Factors) -> PlanOf:
        """Experts on the accelerator, most work first. What forward leaves there costs backward no load."""
        plan: PlanOf = {}
        work = self._work
        kept = kept_layers(work)
        for layer, tables in work.tables.items():
            for backward in (FORWARD, BACKWARD):
                factor = factors[self._round_of[layer], backward]
                there = plan[layer, FORWARD] if backward and layer in kept else []
                on = self._split(tables.costs, tables.counts, tables.by_work, backward, factor, there)
                plan[layer, backward] = [expert for expert in tables.by_work if expert in on]
        return plan

    def _split(
        self,
        costs: LayerCosts,
        counts: Sequence[float],
        by_work: Sequence[int],
        is_backward: bool,
        factor: float,
        there: Sequence[int],
    ) -> set[int]:
        ranked = tuple(counts[expert] for expert in by_work)
        rank_of = {expert: rank for rank, expert in enumerate(by_work)}
        resident = frozenset(rank_of[expert] for expert in there)
        key = (id(costs), ranked, is_backward, factor, resident)
        if key not in self._splits:
            problem = replace(costs.problem(ranked, is_backward=is_backward, load_factor=factor), resident=resident)
            self._splits[key] = frozenset(affinity(problem).on_accelerator)
        return {by_work[rank] for rank in self._splits[key]}


def kept_layers(work: StepWork) -> set[int]:
    """Layers whose weights backward finds where forward has left them: those of every device's last two stages."""
    kept: set[int] = set()
    for runs in work.runs:
        last = [run for run in runs if run.is_backward][:2]
        kept.update(layer for run in last for layer in run.layers)
    return kept
