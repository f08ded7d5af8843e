"""What is to be loaded, by phase and urgency (APTMoE, sections 4.2 and 4.3): the queues of a loader and their order.

Runtime and simulator share this: a loader decides only when there is room for one more copy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from enum import Enum, IntEnum
from functools import cache
from itertools import zip_longest

from isthmus.spec.model import UnitKey


class Phase(IntEnum):
    """Why an expert is queued; the lower, the more urgent."""

    EXPERT = 0
    """The present layer's router has chosen it."""
    LAYER = 1
    """The next layer's router is predicted to choose it."""
    STAGE = 2
    """The next stage has often chosen it."""


class Verdict(Enum):
    """What becomes of the first of a queue."""

    TAKE = "take"
    SKIP = "skip"
    """It leaves its queue: it is there already, or there is nothing to load."""
    WAIT = "wait"
    """It stays, with all behind it: there is no room for it now."""


class LoadQueues:
    """One queue per phase. Not thread-safe."""

    def __init__(self) -> None:
        self._queues: dict[Phase, OrderedDict[UnitKey, None]] = {phase: OrderedDict() for phase in Phase}

    def __bool__(self) -> bool:
        return any(self._queues.values())

    def put(self, phase: Phase, keys: Iterable[UnitKey]) -> None:
        """Replaces what is still waiting, most urgent first."""
        self._queues[phase] = OrderedDict.fromkeys(keys)

    def replace(self, phase: Phase, keys: Iterable[UnitKey]) -> int:
        """Likewise. Returns how many entries are gone."""
        before = self._queues[phase]
        self.put(phase, keys)
        return len(before.keys() - self._queues[phase].keys())

    def clear(self, phase: Phase | None = None) -> int:
        """Drops what is waiting (None: in every phase). Returns how many entries are gone."""
        queues = self._queues.values() if phase is None else (self._queues[phase],)
        num_dropped = sum(map(len, queues))
        for queue in queues:
            queue.clear()
        return num_dropped

    def waiting(self, phase: Phase) -> list[UnitKey]:
        return list(self._queues[phase])

    def demand(self, key: UnitKey) -> bool:
        """Puts ``key`` ahead of everything. Returns whether it was queued before."""
        phases = [phase for phase, queue in self._queues.items() if key in queue]
        for phase in phases:
            del self._queues[phase][key]
        self._queues[Phase.EXPERT][key] = None
        self._queues[Phase.EXPERT].move_to_end(key, last=False)
        return bool(phases)

    def take(self, ask: Callable[[Phase, UnitKey], Verdict]) -> bool:
        """Asks for the first of each queue, the most urgent phase first, until one is taken. Whether one was."""
        for phase, queue in self._queues.items():
            while queue:
                key = next(iter(queue))
                verdict = ask(phase, key)
                if verdict is Verdict.WAIT:
                    break
                queue.pop(key, None)
                if verdict is Verdict.TAKE:
                    return True
        return False

    def take_missing(self, known: Container[UnitKey]) -> UnitKey | None:
        """What ``take`` takes where there is room for everything and only what is not ``known`` is wanted."""
        for queue in self._queues.values():
            while queue:
                key, _ = queue.popitem(last=False)
                if key not in known:
                    return key
        return None


@cache
def unit_key(layer: int, expert: int) -> UnitKey:
    """The one object for this key: dictionaries find it without comparing."""
    return UnitKey(layer, expert)


@cache
def expert_keys(layer: int, num_experts: int) -> tuple[UnitKey, ...]:
    """Of all experts of a layer."""
    return tuple(unit_key(layer, expert) for expert in range(num_experts))


def by_rank(counts_LE: Mapping[int, Sequence[float]]) -> list[UnitKey]:
    """Experts of all layers of a stage, the most popular rank of each layer first (APTMoE, section 4.2).

    ``counts_LE``: tokens or shares of every expert by layer, the layers in the order of the pass.
    """
    return in_turn(
        {
            layer: sorted(range(len(counts_E)), key=[-count for count in counts_E].__getitem__)
            for layer, counts_E in counts_LE.items()
        }
    )


def in_turn(ranked_LE: Mapping[int, Sequence[int]]) -> list[UnitKey]:
    """The first expert of each layer, then the second of each, and so on; all experts of a layer are there."""
    rows = [[*map(expert_keys(layer, len(order)).__getitem__, order)] for layer, order in ranked_LE.items()]
    if len(rows) == 1:
        return rows[0]
    return [key for rank in zip_longest(*rows) for key in rank if key is not None]
