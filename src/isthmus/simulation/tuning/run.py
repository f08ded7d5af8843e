"""Steps one after the other under each policy, on one cluster with one popularity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from isthmus.planning.popularity import skewness
from isthmus.simulation.tuning.bound import bubble_factor, norm_bound_s, step_bound_s
from isthmus.simulation.tuning.candidates import Choice, choose
from isthmus.simulation.tuning.costs import Costs
from isthmus.simulation.tuning.mapping import (
    by_time,
    check_hosts,
    other_mappings,
    own_stages,
    resident_short_bytes,
    stages_for,
)
from isthmus.simulation.tuning.pipeline import StepResult, simulate_step
from isthmus.simulation.tuning.policies import (
    Aptmoe,
    Counts,
    CpuExperts,
    GPipe,
    GPipeOffload,
    History,
    Mobius,
    StepPolicy,
)
from isthmus.simulation.tuning.popularity import Floats
from isthmus.simulation.tuning.work import Backlog, StepWork
from isthmus.simulation.tuning.zero3 import zero3_step_s
from isthmus.spec.plan import Stage
from isthmus.spec.timeline import Timeline

FIXED: dict[str, type[StepPolicy]] = {
    "gpipe": GPipe,
    "gpipe-offload": GPipeOffload,
    "mobius": Mobius,
    "cpu-experts": CpuExperts,
    "aptmoe": Aptmoe,
}
POLICIES = (*FIXED, "affinity", "zero3")
RUNTIME_NAMES = {"resident": "gpipe", "paper": "aptmoe"}
"""What ``isthmus tune --policy`` calls the same; the others have one name."""
Tell = Callable[[str, int], None]
"""(policy, steps done)"""


class Popularity(Protocol):
    """``DrawnPopularity`` or ``TracedPopularity``."""

    def steps(self, num_tokens: int) -> Iterator[dict[int, Floats]]: ...


@dataclass(kw_only=True)
class Outcome:
    """A policy's steps. ``seconds``: of each. ``timelines``: of the last, by device."""

    policy: str
    seconds: list[float] = field(default_factory=list)
    last: StepResult | None = None
    note: str = ""
    stages: tuple[Stage, ...] = ()
    bound_s: float = 0.0
    """Of the last step, without the bubble factor: of steps that wait for the norm, if the policy's do."""
    bubble_factor: float = 1.0

    @property
    def counted(self) -> list[float]:
        """The first step knows no popularity, so it does not count if there are others."""
        return self.seconds[1:] or self.seconds

    @property
    def timelines(self) -> tuple[Timeline, ...]:
        return self.last.timelines if self.last is not None else ()


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Outcomes by policy, and what is the same for all."""

    outcomes: dict[str, Outcome]
    stages: tuple[Stage, ...]
    skewness: float
    """Of the last step's counts."""


def simulate_tuning(
    costs: Costs,
    popularity: Callable[[], Popularity],
    *,
    policies: Sequence[str] = POLICIES,
    num_steps: int = 2,
    keeps_spans: bool = False,
    tell: Tell = lambda policy, steps: None,
) -> Simulated:
    """``popularity()`` gives every policy the same counts anew. With ``keeps_spans`` the last step has its timelines.

    Raises ``IsthmusError`` for what does not fit.
    """
    check_hosts(costs)
    only_ours = set(policies) == {"affinity"}
    stages = (own_stages if only_ours else stages_for)(costs, costs.job.num_stages)
    order = costs.order
    outcomes: dict[str, Outcome] = {}
    bounds: dict[tuple[Sequence[Stage], bool], tuple[float, float]] = {}
    work: StepWork | None = None
    for policy in policies:
        outcome = outcomes[policy] = Outcome(policy=policy)
        if policy == "gpipe" and (short := resident_short_bytes(costs, stages)) > 0:
            outcome.note = f"does not fit: {short / 2**30:.0f} GiB are missing on an accelerator"
            continue
        runner = _Runner(costs, stages, order, policy)
        steps = popularity().steps(costs.job.num_tokens)
        for number in range(num_steps):
            counts = {layer: counts_E.tolist() for layer, counts_E in next(steps).items()}
            is_last = number == num_steps - 1
            outcome.seconds.append(runner.step(counts, keeps_spans=keeps_spans and is_last))
            tell(policy, number + 1)
        work = runner.work
        outcome.last, outcome.note, outcome.stages = runner.last, runner.note, tuple(work.stages)
        key = (work.stages, runner.waits_for_norm)
        if key not in bounds:  # counts are the same for all
            bounds[key] = _bound(runner.waits_for_norm, work)
        outcome.bound_s, outcome.bubble_factor = bounds[key]
    if work is None:
        steps = popularity().steps(costs.job.num_tokens)
        work = StepWork(costs, stages, order, {layer: c.tolist() for layer, c in next(steps).items()})
    return Simulated(
        outcomes=outcomes,
        stages=stages,
        skewness=skewness([np.asarray(counts) for counts in work.counts.values()]),
    )


def _bound(waits_for_norm: bool, work: StepWork) -> tuple[float, float]:
    """(seconds, what the pipeline's beginning and end make of them)."""
    if waits_for_norm:
        bound_s = norm_bound_s(work)
        return bound_s, norm_bound_s(work, fills=True) / bound_s
    return step_bound_s(work), bubble_factor(work.num_micro_batches, len(work.stages), len(work.order))


class _Runner:
    """One policy, step after step. A step that is like the one before is not played through again."""

    def __init__(self, costs: Costs, stages: Sequence[Stage], order: Sequence[int], policy: str) -> None:
        self.last: StepResult | None = None
        self.note = ""
        self.waits_for_norm = False
        self._costs, self._stages, self._order, self._policy = costs, stages, order, policy
        self.work = StepWork(costs, stages, order, {})
        self._history = History()
        self._mappings: list[tuple[Stage, ...]] = []
        if policy == "affinity":
            others = other_mappings(costs, stages) if costs.job.num_stages is None else []
            by_times = by_time(costs, [stages, *others])
            self._mappings = [mapped for mapped in dict.fromkeys([*others, *by_times]) if mapped != tuple(stages)]
        self._choice: Choice | None = None
        self._seen: tuple[object, ...] = ()
        self._backlogs: tuple[Backlog, ...] = ()
        self._seconds = 0.0
        self._num_steps = 0

    def step(self, counts: Counts, *, keeps_spans: bool) -> float:
        expected = self._history.expected(counts)
        self._num_steps += 1
        seen = (counts, expected, self._backlogs)
        # With the second step's plan mappings are compared.
        is_new = self._num_steps == 2 or self._seen != seen
        if is_new or keeps_spans:
            self._seen = seen
            self._play(counts, expected, is_new, keeps_spans)
        self._history.learn(counts)
        return self._seconds

    def _play(self, counts: Counts, expected: Counts, is_new: bool, keeps_spans: bool) -> None:
        if is_new:
            self.work = self.work.with_counts(counts)
        if self._policy == "zero3":
            self._seconds = zero3_step_s(self.work)
            self.note = "cost model"
            return
        if self._policy == "affinity":
            choice = self._choice
            # As the runtime does: the plan is made anew after 1, 2, 4, 8, … steps.
            if choice is None or (is_new and self._num_steps & (self._num_steps - 1) == 0):
                choice = self._plan(expected)
            if choice.stages != self.work.stages:
                self.work = StepWork(self._costs, choice.stages, self._order, counts)
            policy = choice.make(self.work, expected)
        else:
            policy = FIXED[self._policy](self.work, expected)
        self.waits_for_norm = policy.overlaps_steps
        self.last = simulate_step(self.work, policy, backlogs=self._backlogs, keeps_spans=keeps_spans)
        self._seconds = self.last.seconds
        self._backlogs = self.last.backlogs if policy.overlaps_steps else ()

    def _plan(self, expected: Counts) -> Choice:
        """Chooses anew; mappings are compared when some popularity is known first. A pipeline of another mapping is
        built anew, which is no part of a step: it begins as if it had always been there."""
        before = self._choice
        likely = StepWork(self._costs, self._stages, self._order, expected)
        mappings = self._mappings if self._num_steps == 2 else ()
        choice = self._choice = choose(likely, mappings, last=before if self._num_steps > 2 else None)
        self.note = f"{choice.name} ({choice.num_tried} schedules compared)"
        if before is None or before.stages != choice.stages:
            self._backlogs = choice.backlogs
        return choice
