"""Our policy in the simulator: what it weighs (``Mix``) and how many stages go round the devices are tried out at the
counts that are expected, and the fastest schedule is taken.

Many stages keep bubbles short and make what must be there before a stage begins small, few make fewer hand-overs. Some
mixes are compared at every mapping first, then single weights of the best are moved. Mobius' and the published rule's
schedules, as our runtime plays them, are among the candidates of every mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from isthmus.simulation.tuning.pipeline import StepResult, simulate_step
from isthmus.simulation.tuning.policies import Affinity, Counts, Mix, RuntimeAptmoe, RuntimeMobius, StepPolicy
from isthmus.simulation.tuning.work import Backlog, StepWork
from isthmus.spec.plan import Stage

MIXES = (
    Mix(least_worth=1.0),
    Mix(cpu_weight=1.4, least_worth=0.5),
    Mix(cpu_weight=1.4, uses_what_is_there=True),
)
"""With which mappings are compared."""
MOVES: dict[str, tuple[object, ...]] = {
    "cpu_weight": (1.0, 1.4, 2.0),
    "least_worth": (0.0, 0.5, 1.0, 2.0),
    "link_price": (None, 1.0),
    "uses_what_is_there": (False, True),
}
MAX_BEHIND = 1.15
"""A mapping that is slower by more with one mix is not tried with the others."""
MAX_ROUNDS = 2
Make = Callable[[StepWork, Counts], StepPolicy]


@dataclass(frozen=True)
class Choice:
    """The fastest candidate. ``make``: the policy for a step's real work, in any process. ``mix``: if it is ours."""

    make: Make
    stages: Sequence[Stage]
    name: str
    predicted_s: float
    mix: Mix | None = None
    backlogs: tuple[Backlog, ...] = ()
    """What such steps leave to one another."""
    num_tried: int = 0


def steady_step(work: StepWork, make: Make) -> StepResult:
    """A step after others like it, popularity being as expected."""
    return _play(work, make(work, work.counts))


def _play(work: StepWork, policy: StepPolicy) -> StepResult:
    if not policy.overlaps_steps:
        return simulate_step(work, policy)
    return simulate_step(work, policy, backlogs=[work.steps_after(device) for device in range(len(work.order))])


def choose(work: StepWork, mappings: Sequence[Sequence[Stage]] = (), *, last: Choice | None = None) -> Choice:
    """``work``: a step with the expected counts and the stages that other policies have; ``mappings``: others that may
    be taken instead. ``last``: what was chosen before, whose mapping is kept and whose weights are moved."""
    if last is not None and last.mix is not None:
        search = _Search(StepWork(work.costs, last.stages, work.order, work.counts))
        search.offer_mix(last.mix)
        search.move()
        return replace(search.best, num_tried=search.num_tried)
    searches = [_Search(work)]
    searches += [_Search(StepWork(work.costs, stages, work.order, work.counts)) for stages in mappings]
    near = searches
    for mix in MIXES:
        for search in near:
            search.offer_mix(mix)
        most_s = MAX_BEHIND * min(search.best.predicted_s for search in near)
        near = [search for search in near if search.best.predicted_s <= most_s]
    fastest = min(near, key=lambda search: search.best.predicted_s)
    fastest.move()
    for search in searches:
        search.offer(RuntimeMobius, "mobius in our runtime")
        search.offer(RuntimeAptmoe, "rule in our runtime")
    best = min((search.best for search in searches), key=lambda choice: choice.predicted_s)
    return replace(best, num_tried=sum(search.num_tried for search in searches))


class _Search:
    """The best so far for one mapping."""

    def __init__(self, work: StepWork) -> None:
        self._work = work
        self._seen: set[Mix] = set()
        self._decisions: list[tuple[object, ...]] = []
        self.num_tried = 0
        self.best = Choice(RuntimeMobius, work.stages, "none", float("inf"))

    def offer(self, make: Make, name: str, mix: Mix | None = None) -> bool:
        """Whether the candidate is better than the best so far."""
        self.num_tried += 1
        policy = make(self._work, self._work.counts)
        if isinstance(policy, Affinity):
            decisions = policy.decisions()
            if decisions in self._decisions:
                return False  # its schedule has been compared already
            self._decisions.append(decisions)
        result = _play(self._work, policy)
        if result.seconds >= self.best.predicted_s * (1 - 1e-9):
            return False
        name = f"{len(self._work.stages)} stages, {name}"
        self.best = Choice(make, self._work.stages, name, result.seconds, mix, result.backlogs)
        return True

    def offer_mix(self, mix: Mix) -> bool:
        if mix in self._seen:
            return False
        self._seen.add(mix)
        return self.offer(partial(Affinity, mix=mix), str(mix), mix)

    def move(self) -> None:
        """Weights of the best mix are moved one at a time until none helps."""
        for _ in range(MAX_ROUNDS):
            if not any([self.offer_mix(mix) for mix in self._near()]):
                break

    def _near(self) -> Iterator[Mix]:
        for name, values in MOVES.items():
            for value in values:
                if self.best.mix is not None:
                    yield replace(self.best.mix, **{name: value})
