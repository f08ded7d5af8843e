"""The weights of a device's layers: which it holds, what it loads next, and what its computation waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import filterfalse

from isthmus.planning.loading import Phase, unit_key
from isthmus.simulation.tuning.events import Events, Lane
from isthmus.simulation.tuning.links import Loader
from isthmus.simulation.tuning.media import Medium
from isthmus.simulation.tuning.policies import StepPolicy
from isthmus.simulation.tuning.work import Run, StepWork
from isthmus.spec.model import DENSE, UnitKey


class Weights:
    """Of the stages that the policy holds beside the present run's."""

    __slots__ = ("_policy", "_run", "_runs", "_stage_keys", "_then", "_work", "awaited", "loader", "unstepped")

    def __init__(
        self,
        work: StepWork,
        policy: StepPolicy,
        runs: Sequence[Run],
        events: Events,
        lane: Lane,
        media: tuple[Medium, ...],
        unstepped: Iterable[int],
    ) -> None:
        """``unstepped``: layers whose weights are those of the step before as long as they have not been stepped."""
        self._work, self._policy, self._runs = work, policy, runs
        self._run: Run | None = None
        """The present one."""
        self._stage_keys: list[UnitKey] = []
        self.unstepped = set(unstepped)
        self.awaited: dict[UnitKey, None] = {}
        """What has to land before ``_then()`` goes on: a stage, or what the open micro-batch needs."""
        self._then: Callable[[], None]
        layers = {layer: work.layer_costs(layer) for run in runs for layer in run.layers}
        loads = {
            layer: [costs.load(policy.piece_bytes, is_expert=is_expert) for is_expert in (False, True)]
            for layer, costs in layers.items()
        }
        self.loader = Loader(events, lane, media, work.costs.job.copy_window, loads, self._landed, self.awaited)
        if policy.is_resident:
            self.loader.there = dict.fromkeys(self._all_keys(layers.keys()), 0.0)
            self.loader.known = dict.fromkeys(self.loader.there)

    def enter(self, at: int) -> None:
        """Run ``at`` begins, or there is none: the device holds its stage and, as the policy will, others."""
        run = self._run = self._runs[at] if at < len(self._runs) else None
        if run is None or self._policy.is_resident:
            return
        self.loader.forget({layer for other in self._policy.held(self._runs, at) for layer in other.layers})
        self.loader.queues.clear()
        # Without the dense part nothing begins, whatever was dropped.
        self.want(Phase.EXPERT, [unit_key(layer, DENSE) for layer in run.layers])
        self._stage_keys = self._policy.stage_queue(self._runs, at)
        self.want(Phase.STAGE, self._stage_keys)
        self.loader.refill()

    def missing(self) -> list[UnitKey]:
        """Of the present run's stage."""
        assert self._run is not None
        return [key for key in self._policy.run_keys(self._run) if key not in self.loader.there]

    def want(self, phase: Phase, keys: Iterable[UnitKey]) -> None:
        """What the phase's queue is to have, as far as it is missing."""
        missing = filterfalse(self.loader.known.__contains__, keys)
        unstepped = self.unstepped
        if unstepped:
            missing = [key for key in missing if key[0] not in unstepped]
        self.loader.queues.put(phase, missing)

    def wait(self, keys: list[UnitKey], then: Callable[[], None]) -> None:
        """``then()`` once all of ``keys`` have landed. What is neither there nor on its way is loaded ahead of all."""
        assert not self.awaited
        self._then = then
        loader = self.loader
        for key in reversed(keys):
            self.awaited[key] = None
            if key not in loader.known and key.layer not in self.unstepped:
                loader.queues.demand(key)
        loader.refill()

    def stepped(self, layer: int) -> None:
        """New weights may be loaded."""
        if layer not in self.unstepped:
            return
        self.unstepped.discard(layer)
        queues = self.loader.queues
        for key in [key for key in reversed(self.awaited) if key.layer == layer]:
            queues.demand(key)
        if self._run is not None:
            if layer in self._run.layers:
                queues.demand(unit_key(layer, DENSE))
            self.want(Phase.STAGE, self._stage_keys)
            self.loader.refill()

    def _landed(self, key: UnitKey) -> None:
        """One of those that are awaited."""
        del self.awaited[key]
        if not self.awaited:
            self._then()

    def _all_keys(self, layers: Iterable[int]) -> list[UnitKey]:
        keys = [unit_key(layer, DENSE) for layer in layers]
        for layer in self._work.tables.keys() & set(layers):
            keys += self._work.expert_keys(layer, range(self._policy.num_experts(layer)))
        return keys
