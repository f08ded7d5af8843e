"""Our policy in the simulator: plans are made by the runtime's split rule for several worths of link time, every one is
played through at the counts that are expected, and the fastest is taken.

A layer's split depends on what a second of link time is worth: little where loads hide behind other stages' work,
much where the link is what all wait for (``planning/affinity.py``). How many stages go round the devices counts too:
many keep bubbles short and make what must be there before a stage begins small, few make fewer hand-overs. Mappings
are compared first, then one factor for all is searched over a grid, then factors of single rounds and passes are
tried. Mobius' and the published rule's schedules are among the candidates of every mapping, so for the counts it was
made for a plan is never slower than either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from isthmus.planning.affinity import affinity
from isthmus.simulation.tuning.costs import LayerCosts
from isthmus.simulation.tuning.pipeline import simulate_step
from isthmus.simulation.tuning.policies import Aptmoe, Counts, Mobius, Overtaking, Planned, StepPolicy
from isthmus.simulation.tuning.work import BACKWARD, FORWARD, StepWork
from isthmus.spec.plan import Stage

FACTORS = (0.0, 0.5, 1.0, 1.5, 2.5)
"""What a second of link time counts for; 0: everything is loaded unless the accelerator is what all wait for."""
STEPS = (0.6, 1.6)
"""By which factors are multiplied when single ones are tried."""
MAX_ROUNDS = 1
MAX_GROUPS = 10
LEAST = 0.2
"""A factor of 0 is taken for this where it is multiplied."""
MAPPING_FACTORS = (0.5, 1.5)
"""With which mappings are compared."""

Factors = dict[tuple[int, bool], float]
"""By (round over the devices, is_backward)."""
Make = Callable[[StepWork, Counts], StepPolicy]
PlanOf = dict[tuple[int, bool], list[int]]


@dataclass(frozen=True)
class Choice:
    """The fastest candidate. ``make``: the policy for a step's real work."""

    make: Make
    stages: Sequence[Stage]
    name: str
    predicted_s: float
    num_tried: int


def choose(work: StepWork, mappings: Sequence[Sequence[Stage]] = ()) -> Choice:
    """``work``: a step with the expected counts and the stages that other policies have; ``mappings``: others that may
    be taken instead."""
    search = _Search(Choice(Mobius, work.stages, "mobius", float("inf"), 0))
    planners = [Planner(work)]
    planners += [Planner(StepWork(work.costs, stages, work.order, work.counts)) for stages in mappings]
    seconds = [planner.best_s(search) for planner in planners]
    planners[seconds.index(min(seconds))].search(search)
    return replace(search.best, num_tried=search.num_tried)


class _Search:
    """The best so far."""

    def __init__(self, best: Choice) -> None:
        self.best = best
        self.num_tried = 0

    def offer(self, work: StepWork, make: Make, name: str) -> float:
        """Seconds of a candidate, which is taken if it is better than the best so far."""
        self.num_tried += 1
        seconds = simulate_step(work, make(work, work.counts)).seconds
        if seconds < self.best.predicted_s * (1 - 1e-9):
            self.best = Choice(make, work.stages, name, seconds, 0)
        return seconds


class Planner:
    """Plans for expected counts, and remembers the splits it has made: layers with the same counts in another order
    have the same split."""

    def __init__(self, work: StepWork) -> None:
        """``work``: a step with the expected counts."""
        self._work = work
        self._splits: dict[object, frozenset[int]] = {}
        self._seconds_of: dict[tuple[float, ...], float] = {}
        num_devices = len(work.order)
        self._round_of = {
            layer: number // num_devices
            for number, stage in enumerate(work.stages)
            for layer in range(stage.first_layer, stage.last_layer + 1)
        }
        self._num_rounds = -(-len(work.stages) // num_devices)

    def best_s(self, search: _Search) -> float:
        """Of a few candidates: is the mapping worth a search?"""
        rules = ((Mobius, "mobius"), (Aptmoe, "rule"), (Overtaking, "rule, micro-batches overtake"))
        named = [search.offer(self._work, make, f"{len(self._work.stages)} stages, {name}") for make, name in rules]
        return min(*named, *(self.seconds(search, factor) for factor in MAPPING_FACTORS))

    def seconds(self, search: _Search, common: float) -> float:
        """With one factor for all."""
        return self._offer(search, self._all(common))

    def search(self, search: _Search) -> None:
        """Grid, then moves: a pass at a time, then a round of a pass at a time."""
        tried = [(self.seconds(search, common), common) for common in FACTORS]
        best_s, common = min(tried)
        found = self._all(common)
        groups = [[key for key in found if key[1] == backward] for backward in (BACKWARD, FORWARD)]
        groups += [[key] for key in found] if self._num_rounds > 1 else []
        for _ in range(MAX_ROUNDS):
            before_s = best_s
            for group in groups[:MAX_GROUPS]:
                for step in STEPS:
                    moved = found | {key: max(found[key], LEAST) * step for key in group}
                    seconds = self._offer(search, moved)
                    if seconds < best_s * (1 - 1e-9):
                        best_s, found = seconds, moved
                        break
            if best_s == before_s:
                break

    def _all(self, common: float) -> Factors:
        return {(number, backward): common for number in range(self._num_rounds) for backward in (False, True)}

    def _offer(self, search: _Search, factors: Factors) -> float:
        seen = tuple(factors.values())
        if seen in self._seconds_of:
            return self._seconds_of[seen]
        plan = self.plan(factors)
        typical = sorted(factors.values())[len(factors) // 2]

        def make(work: StepWork, expected: Counts) -> StepPolicy:
            return Planned(work, expected, plan, typical)

        values = sorted(set(factors.values()))
        between = f"{values[0]:.2g}" if len(values) == 1 else f"{values[0]:.2g} to {values[-1]:.2g}"
        name = f"{len(self._work.stages)} stages, link seconds count {between}"
        seconds = self._seconds_of[seen] = search.offer(self._work, make, name)
        return seconds

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
