"""A loader's queues: the most urgent phase first, and nothing lost that was not dropped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from isthmus.planning.loading import LoadQueues, Phase, Verdict, by_rank, unit_key
from isthmus.spec.model import UnitKey

A, B, C = (UnitKey(0, expert) for expert in range(3))


def taken(queues: LoadQueues) -> list[UnitKey]:
    found: list[UnitKey] = []

    def ask(phase: Phase, key: UnitKey) -> Verdict:
        found.append(key)
        return Verdict.TAKE

    while queues.take(ask):
        pass
    return found


def test_the_most_urgent_phase_comes_first() -> None:
    queues = LoadQueues()
    queues.replace(Phase.STAGE, [A])
    queues.replace(Phase.EXPERT, [C])
    queues.replace(Phase.LAYER, [B])
    assert taken(queues) == [C, B, A] and not queues


def test_what_waits_holds_up_its_own_queue_only() -> None:
    queues = LoadQueues()
    queues.replace(Phase.EXPERT, [A, B])
    queues.replace(Phase.STAGE, [C])
    asked: list[UnitKey] = []

    def ask(phase: Phase, key: UnitKey) -> Verdict:
        asked.append(key)
        return Verdict.WAIT if key == A else Verdict.TAKE

    assert queues.take(ask) and asked == [A, C]
    assert queues.waiting(Phase.EXPERT) == [A, B] and queues.waiting(Phase.STAGE) == []


def test_what_is_demanded_leaves_its_queue_for_the_front() -> None:
    queues = LoadQueues()
    queues.replace(Phase.STAGE, [A, B])
    queues.replace(Phase.EXPERT, [C])
    assert queues.demand(B) and not queues.demand(UnitKey(9, 9))
    assert taken(queues) == [UnitKey(9, 9), B, C, A]


def test_replacing_and_clearing_count_what_is_dropped() -> None:
    queues = LoadQueues()
    assert queues.replace(Phase.STAGE, [A, B, B]) == 0
    assert queues.replace(Phase.STAGE, [B, C]) == 1
    assert queues.clear(Phase.LAYER) == 0 and queues.clear() == 2 and not queues


KEYS = st.lists(st.sampled_from([UnitKey(layer, expert) for layer in range(2) for expert in range(3)]))


@given(st.dictionaries(st.sampled_from(Phase), KEYS), KEYS)
def test_what_is_missing_is_taken_as_if_each_were_asked_for(
    waiting: dict[Phase, list[UnitKey]], there: list[UnitKey]
) -> None:
    asked, told = LoadQueues(), LoadQueues()
    for phase, keys in waiting.items():
        asked.replace(phase, keys)
        told.replace(phase, keys)
    known, taken_keys = set(there), []

    def ask(phase: Phase, key: UnitKey) -> Verdict:
        if key in known:
            return Verdict.SKIP
        known.add(key)
        taken_keys.append(key)
        return Verdict.TAKE

    while asked.take(ask):
        pass
    known = set(there)
    for wanted in [*taken_keys, None]:
        assert told.take_missing(known) == wanted
        known |= {wanted} if wanted else set()
    assert not told


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=4))
def test_ranks_go_through_all_layers_and_name_every_expert_once(counts: list[list[int]]) -> None:
    order = by_rank(dict(enumerate(counts)))
    assert sorted(order) == [UnitKey(layer, e) for layer, c in enumerate(counts) for e in range(len(c))]
    for layer, of_layer in enumerate(counts):
        mine = [of_layer[key.expert] for key in order if key.layer == layer]
        assert mine == sorted(mine, reverse=True)
    assert order[0] is unit_key(order[0].layer, order[0].expert)
    firsts = [key.layer for key in order[: len(counts)]]
    assert firsts == list(range(len(counts)))
