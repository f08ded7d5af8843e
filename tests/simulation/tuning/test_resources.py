"""Links that share a medium, cores that an expert takes from the optimizer: schedules computed by hand."""

from __future__ import annotations

import pytest

from isthmus.planning.loading import Phase, unit_key
from isthmus.simulation.tuning.events import CpuPool, Events, Lane, Record, Server
from isthmus.simulation.tuning.links import Copy, CopyEngine, Loader, Urgency
from isthmus.simulation.tuning.media import Medium, Relay

LOADS = {layer: [(1.0, 1, 0.0)] * 2 for layer in range(2)}


def test_copies_share_a_medium_and_go_on_alone() -> None:
    """One begins at 0 s, another at 0.5 s, each of 1 s alone: the first ends at 1.5 s, the second at 2 s."""
    events, medium, ended = Events(), Medium(1.0), []
    engines = [CopyEngine(events, Lane("h2d", None), (medium,)) for _ in range(2)]
    for number, start_s in enumerate((0.0, 0.5)):
        copy = Copy(1.0, lambda number: ended.append((number, events.now_s)), (number,))
        events.at(start_s, engines[number].send, copy)
    events.run()
    assert ended == [(0, pytest.approx(1.5)), (1, pytest.approx(2.0))]


def test_what_is_slowed_and_hastened_again_lands_when_all_of_it_has_gone() -> None:
    """5 s of a copy beside what relays send: 1 s from 0.5 s on, which takes 2, and 2 s from 3 s on, which wait for one
    another: it is not done when it was first expected, at 5 s."""
    events, medium, ended = Events(), Medium(1.0), []

    def end(what: str) -> None:
        ended.append((what, events.now_s))

    engine, relay = CopyEngine(events, Lane("h2d", None), (medium,)), Relay(events, (medium,))
    events.at(0.0, engine.send, Copy(5.0, end, ("copy",)))
    events.at(0.5, relay.send, 1.0, end, "first")
    for name in ("second", "third"):
        events.at(3.0, relay.send, 1.0, end, name)
    events.run()
    # The copy has had 0.5 + 1 + 0.5 s at 3 s, and a half of every second then, until the relay is done.
    assert ended == [("first", 2.5), ("second", 5.0), ("third", 7.0), ("copy", 8.0)]


def test_an_expert_interrupts_the_optimizer_which_goes_on_where_it_was() -> None:
    events, ended = Events(), {}
    pool = CpuPool(events, Record(True))
    events.at(0.0, lambda: pool.step(0, 2.0, lambda: ended.update(step=events.now_s)))
    events.at(
        0.5,
        lambda: pool.compute(
            1.0, lambda: ended.update(expert=events.now_s), kind="expert_forward", name="", num_tokens=1
        ),
    )
    events.run()
    assert ended == {"expert": pytest.approx(1.5), "step": pytest.approx(3.0)}


def test_a_server_takes_work_in_the_order_of_asking() -> None:
    events, ended = Events(), []
    server = Server(events)
    for seconds in (2.0, 1.0):
        events.at(0.0, server.serve, seconds, lambda: ended.append(events.now_s))
    events.run()
    assert ended == [2.0, 3.0]


@pytest.mark.parametrize(("piece_s", "gradients_s", "tokens_s"), [(0.0, 4.0, 5.0), (1.0, 5.0, 4.0)])
def test_what_is_urgent_waits_for_a_piece_only(piece_s: float, gradients_s: float, tokens_s: float) -> None:
    """Gradients of 4 s, of which the first piece takes 2 s, tokens of 1 s after 2.5 s."""
    events, landed = Events(), {}
    record = Record(True)
    engine = CopyEngine(events, record.lane("d2h"), ())
    gradients = Copy(
        4.0,
        lambda: landed.update(gradients=events.now_s),
        kind="gradient",
        num_bytes=400,
        urgency=Urgency.LATER,
        first_s=2.0,
        piece_s=piece_s,
    )
    tokens = Copy(1.0, lambda: landed.update(tokens=events.now_s), num_bytes=100)
    events.at(0.0, engine.send, gradients)
    events.at(2.5, engine.send, tokens)
    events.run()
    assert landed == {"gradients": pytest.approx(gradients_s), "tokens": pytest.approx(tokens_s)}
    assert record.num_bytes == {"d2h": 500} and record.busy_s == {"d2h": pytest.approx(5.0)}


def test_the_next_forwards_first_layer_is_stepped_first() -> None:
    events, order = Events(), []
    pool = CpuPool(events, Record(False))
    for layer in (3, 2, 0, 1):
        pool.step(layer, 1.0, lambda layer=layer: order.append(layer))
    events.run()
    assert order == [3, 0, 1, 2]


def test_an_urgent_expert_waits_for_the_window_only() -> None:
    events, landed = Events(), []
    keys = [unit_key(0, expert) for expert in range(5)]
    loader = Loader(events, Lane("h2d", None), (), 2, LOADS, lambda key: landed.append(key.expert), keys)

    def begin() -> None:
        loader.queues.replace(Phase.STAGE, keys)
        loader.refill()

    def hurry() -> None:
        loader.queues.replace(Phase.EXPERT, [unit_key(0, 4)])
        loader.refill()

    events.at(0.0, begin)
    events.at(0.5, hurry)
    events.run()
    assert landed == [0, 1, 4, 2, 3]


def test_what_left_the_accelerator_while_it_was_on_its_way_is_not_there() -> None:
    events, landed = Events(), []
    keys = [unit_key(0, 0), unit_key(1, 0)]
    loader = Loader(events, Lane("h2d", None), (), 1, LOADS, landed.append, keys)
    loader.queues.replace(Phase.STAGE, keys)
    loader.refill()
    events.at(0.5, loader.forget, {1})
    events.run()
    assert landed == [unit_key(1, 0)] and list(loader.there) == landed and loader.num_landed == 1
