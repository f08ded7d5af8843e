"""Steps one after the other under each policy, on one cluster with one popularity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
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
from isthmus.simulation.tuning.pipeline import StepResult
from isthmus.simulation.tuning.players import Players, Step, result_of
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
from isthmus.simulation.tuning.work import StepWork
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
    num_processes: int = 1,
    tell: Tell = lambda policy, steps: None,
) -> Simulated:
    """``popularity()`` gives every policy the same counts anew. With ``keeps_spans`` the last step has its timelines.
    ``num_processes``: that may play steps, where there are many.

    Raises ``IsthmusError`` for what does not fit.
    """
    check_hosts(costs)
    only_ours = set(policies) == {"affinity"}
    stages = (own_stages if only_ours else stages_for)(costs, costs.job.num_stages)
    outcomes: dict[str, Outcome] = {}
    bounds: dict[tuple[Sequence[Stage], bool], tuple[float, float]] = {}
    counts: Counts | None = None
    with Players(costs, num_steps * len(policies), num_processes) as players:
        for policy in policies:
            outcome = outcomes[policy] = Outcome(policy=policy)
            if policy == "gpipe" and (short := resident_short_bytes(costs, stages)) > 0:
                outcome.note = f"does not fit: {short / 2**30:.0f} GiB are missing on an accelerator"
                continue
            runner = _Runner(costs, stages, policy, players)
            for number, counts in enumerate(_counts(popularity(), costs, num_steps), start=1):
                runner.step(counts, keeps_spans=keeps_spans and number == num_steps)
                tell(policy, number)
            assert counts is not None
            runner.close(outcome)
            key = (outcome.stages, runner.waits_for_norm)
            if key not in bounds:  # counts are the same for all
                work = StepWork(costs, outcome.stages, costs.order, counts)
                bounds[key] = _bound(runner.waits_for_norm, work)
            outcome.bound_s, outcome.bubble_factor = bounds[key]
    if counts is None:
        (counts,) = _counts(popularity(), costs, 1)
    return Simulated(
        outcomes=outcomes,
        stages=stages,
        skewness=skewness([np.asarray(counts_E) for counts_E in counts.values()]),
    )


def _counts(popularity: Popularity, costs: Costs, num_steps: int) -> Iterator[dict[int, list[float]]]:
    """Of each step."""
    for counts in islice(popularity.steps(costs.job.num_tokens), num_steps):
        yield {layer: counts_E.tolist() for layer, counts_E in counts.items()}


def _bound(waits_for_norm: bool, work: StepWork) -> tuple[float, float]:
    """(seconds, what the pipeline's beginning and end make of them)."""
    if waits_for_norm:
        bound_s = norm_bound_s(work)
        return bound_s, norm_bound_s(work, fills=True) / bound_s
    return step_bound_s(work), bubble_factor(work.num_micro_batches, len(work.stages), len(work.order))


class _Runner:
    """One policy, step after step. A step that is like the one before is not played through again."""

    def __init__(self, costs: Costs, stages: Sequence[Stage], policy: str, players: Players) -> None:
        self._costs, self._stages, self._policy, self._players = costs, tuple(stages), policy, players
        self._history = History()
        self._mappings: list[tuple[Stage, ...]] = []
        if policy == "affinity":
            others = other_mappings(costs, stages) if costs.job.num_stages is None else []
            by_times = by_time(costs, [stages, *others])
            self._mappings = [mapped for mapped in dict.fromkeys([*others, *by_times]) if mapped != self._stages]
        self._choice: Choice | None = None
        self._seen: tuple[Counts, Counts] | None = None
        self._results: list[Future[StepResult] | float] = []
        """Of each step; seconds from a cost model."""

    @property
    def waits_for_norm(self) -> bool:
        """Whether its steps begin when all gradients of the one before are there."""
        return self._policy == "affinity"

    def step(self, counts: Counts, *, keeps_spans: bool) -> None:
        """Plays the next step, or begins to. Blocks as ``Players.play``."""
        expected = self._history.expected(counts)
        # With the second step's plan mappings are compared.
        is_new = len(self._results) == 1 or self._seen != (counts, expected)
        if is_new or keeps_spans:
            self._seen = (counts, expected)
            self._results.append(self._play(counts, expected, is_new, keeps_spans))
        else:
            self._results.append(self._results[-1])
        self._history.learn(counts)

    def close(self, outcome: Outcome) -> None:
        """Writes into ``outcome`` what all steps took. Blocks until they have been played."""
        results = [result_of(result) if isinstance(result, Future) else result for result in self._results]
        outcome.seconds = [result.seconds if isinstance(result, StepResult) else result for result in results]
        outcome.last = results[-1] if isinstance(results[-1], StepResult) else None
        outcome.stages = self._stages
        if self._choice is not None:
            outcome.stages = tuple(self._choice.stages)
            outcome.note = f"{self._choice.name} ({self._choice.num_tried} schedules compared)"
        elif outcome.last is None:
            outcome.note = "cost model"

    def _play(self, counts: Counts, expected: Counts, is_new: bool, keeps_spans: bool) -> Future[StepResult] | float:
        if self._policy == "zero3":
            return zero3_step_s(StepWork(self._costs, self._stages, self._costs.order, counts))
        stages, make, backlogs = self._stages, FIXED.get(self._policy), ()
        if make is None:
            choice = self._chosen(expected, is_new)
            stages, make, backlogs = tuple(choice.stages), choice.make, choice.backlogs
        step = Step(
            stages=stages, make=make, counts=counts, expected=expected, backlogs=backlogs, keeps_spans=keeps_spans
        )
        return self._players.play(step)

    def _chosen(self, expected: Counts, is_new: bool) -> Choice:
        """Chooses as the runtime does, whose plan is made anew after 1, 2, 4, 8, … steps; mappings are compared when
        some popularity is known first. A pipeline of another mapping is built anew, which is no part of a step: it
        begins as if it had always been there."""
        number = len(self._results) + 1
        if self._choice is None or (is_new and number & (number - 1) == 0):
            likely = StepWork(self._costs, self._stages, self._costs.order, expected)
            mappings = self._mappings if number == 2 else ()
            self._choice = choose(likely, mappings, last=self._choice if number > 2 else None)
        return self._choice
