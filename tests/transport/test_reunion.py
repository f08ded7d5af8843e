"""Ranks that meet again after some are lost, also while they meet; ranks are threads."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from tests.transport.groups import run_threads

from isthmus.transport import reunion as reunion_module
from isthmus.transport.errors import EndedError, PeerLostError, RendezvousError, TransportError
from isthmus.transport.rendezvous import listen
from isthmus.transport.reunion import Reunion
from isthmus.transport.sockets import SocketGroup

FOREVER_S = 1000.0
"""Longer than a test may take: nothing waits for this limit."""


def on_ranks(
    world_size: int, body: Callable[[SocketGroup, Reunion], Any], timeout_s: float = 10.0, away: int | None = None
) -> list[Any]:
    """What ``body`` returned or raised on each rank, which is a thread. ``away``: goes before it is connected."""
    with listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]

        def run(rank: int) -> Any:
            group = SocketGroup.connect(
                rank=rank,
                world_size=world_size,
                port=port,
                timeout_s=timeout_s,
                listener=listener if rank == 0 else None,
            )
            if rank == away:
                group.broadcast(torch.zeros(17, dtype=torch.int64))
                return group.close()
            with group, Reunion.prepare(group) as reunion:
                return body(group, reunion)

        return run_threads([lambda rank=rank: run(rank) for rank in range(world_size)])


def total(group: SocketGroup) -> float:
    value = torch.tensor([float(group.global_ranks[group.rank])])
    group.all_reduce(value)
    return float(value)


def after_loss(group: SocketGroup, reunion: Reunion) -> tuple[tuple[int, ...], float]:
    """The members that are left, and the sum of their numbers, once this rank has noticed."""
    with pytest.raises(PeerLostError) as caught:
        while True:
            total(group)
    group.fail(caught.value)
    with reunion.meet() as left:
        return left.global_ranks, total(left)


@pytest.mark.parametrize("lost", [(1,), (3,), (1, 2), (1, 2, 3)])
def test_those_that_are_left_are_a_group_again(lost: tuple[int, ...]) -> None:
    def body(group: SocketGroup, reunion: Reunion) -> Any:
        if group.rank in lost:
            return None  # closes its connections, as a process that is killed does
        return after_loss(group, reunion)

    left = tuple(rank for rank in range(4) if rank not in lost)
    found = on_ranks(4, body, timeout_s=FOREVER_S)
    assert [each for rank, each in enumerate(found) if rank not in lost] == [(left, float(sum(left)))] * len(left)


def test_they_may_meet_more_than_once() -> None:
    def body(group: SocketGroup, reunion: Reunion) -> Any:
        seen = []
        for leaving in (3, 1):
            if reunion.rank == leaving:
                group.close()
                return None
            with pytest.raises(PeerLostError) as caught:
                while True:
                    total(group)
            group.fail(caught.value)
            group = reunion.meet()
            seen.append((group.global_ranks, total(group)))
        group.close()
        return seen

    wanted = [((0, 1, 2), 3.0), ((0, 2), 2.0)]
    found = on_ranks(4, body)
    assert found[0] == found[2] == wanted


def test_nobody_needs_to_be_lost() -> None:
    def body(group: SocketGroup, reunion: Reunion) -> Any:
        group.close()
        with reunion.meet() as left:
            return left.global_ranks

    assert on_ranks(3, body) == [(0, 1, 2)] * 3


def kill(reunion: Reunion) -> None:
    """As the system does when a process is killed: connections end without a word."""
    for connection in list(reunion._connections.values()):  # the thread drops each that has ended
        connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("ends", "kind", "message"),
    [
        (kill, RendezvousError, "rank 0 is lost, or has gone on without rank 1"),
        (lambda reunion: reunion.close(), EndedError, "rank 0 has ended"),
        (lambda reunion: reunion.close(ValueError("a user's mistake")), EndedError, "rank 0 has ended"),
        (lambda reunion: reunion.close(TransportError("no way")), RendezvousError, "rank 0 has ended: no way"),
    ],
)
def test_without_rank_0_nobody_goes_on(ends: Callable[[Reunion], None], kind: type, message: str) -> None:
    def body(group: SocketGroup, reunion: Reunion) -> Any:
        if group.rank == 0:
            return ends(reunion)
        group.close()
        return reunion.meet()

    error = on_ranks(3, body, timeout_s=FOREVER_S)[1]
    assert type(error) is kind and message in str(error)


def test_one_that_comes_too_late_is_told() -> None:
    met = threading.Event()

    def body(group: SocketGroup, reunion: Reunion) -> Any:
        group.close()
        if group.rank == 2:
            assert met.wait(20)
            return reunion.meet()
        with reunion.meet() as left:
            met.set()
            return left.global_ranks

    *found, late = on_ranks(3, body, timeout_s=2.0)
    assert found == [(0, 1)] * 2 and isinstance(late, RendezvousError)


def test_all_are_told_who_was_lost_before_it_was_connected() -> None:
    def body(group: SocketGroup, reunion: Reunion) -> Any:
        group.close()
        return reunion.meet()

    first, _, other = on_ranks(3, body, timeout_s=FOREVER_S, away=1)
    assert isinstance(first, PeerLostError) and str(first) == "rank 1 lost: hung up"
    assert isinstance(other, RendezvousError) and str(other) == f"rank 0 has ended: {first}"


@pytest.mark.parametrize("lost", [1, 3])
def test_one_that_is_lost_while_they_meet_is_done_without(lost: int) -> None:
    def body(group: SocketGroup, reunion: Reunion) -> Any:
        group.close()
        if group.rank == lost:
            with listen("127.0.0.1") as own:
                reunion._ask(["127.0.0.1", own.getsockname()[1]])  # the others know now where it is to be found
            return kill(reunion)
        with pytest.raises(PeerLostError):
            reunion.meet()
        with reunion.meet() as left:
            return left.global_ranks, total(left)

    left = tuple(rank for rank in range(4) if rank != lost)
    found = on_ranks(4, body, timeout_s=FOREVER_S)
    assert [found[rank] for rank in left] == [(left, float(sum(left)))] * 3


def is_silent(monkeypatch: pytest.MonkeyPatch, silent: int) -> None:
    """``silent`` does not answer, as a process that is stopped."""
    send = Reunion._send
    monkeypatch.setattr(reunion_module, "_SILENT_S", 1.0)
    monkeypatch.setattr(Reunion, "_send", lambda self, *said: None if self.rank == silent else send(self, *said))


def test_one_whose_process_is_stopped_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    is_silent(monkeypatch, 1)
    met = threading.Event()

    def body(group: SocketGroup, reunion: Reunion) -> Any:
        group.close()
        if group.rank == 1:
            assert met.wait(60)
            return reunion.meet()  # it runs again
        with reunion.meet() as left:
            met.set()
            return left.global_ranks

    first, late, third = on_ranks(3, body, timeout_s=FOREVER_S)
    assert first == third == (0, 2) and "gone on without rank 1" in str(late)


def test_nobody_waits_for_a_rank_0_whose_process_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    is_silent(monkeypatch, 0)
    ended = threading.Barrier(3)

    def body(group: SocketGroup, reunion: Reunion) -> Any:
        try:
            if group.rank:
                reunion.meet()
        finally:
            ended.wait(60)

    for error in on_ranks(3, body, timeout_s=FOREVER_S)[1:]:
        assert type(error) is RendezvousError and "rank 0 is lost" in str(error)


def test_a_rank_0_that_is_busy_with_something_else_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reunion_module, "_SILENT_S", 1.0)

    def body(group: SocketGroup, reunion: Reunion) -> Any:
        group.close()
        if group.rank == 0:
            time.sleep(3)
        with reunion.meet() as left:
            return left.global_ranks

    assert on_ranks(3, body, timeout_s=FOREVER_S) == [(0, 1, 2)] * 3


def test_nothing_listens_elsewhere_while_they_meet_and_nothing_is_left_behind() -> None:
    process = psutil.Process()

    def listening() -> set[str]:
        return {each.laddr.ip for each in process.net_connections() if each.status == psutil.CONN_LISTEN}

    before = process.num_fds(), threading.active_count(), listening()

    def body(group: SocketGroup, reunion: Reunion) -> Any:
        group.close()
        found = set()
        if group.rank == 0:
            while not {1, 2} <= reunion._said.keys():
                time.sleep(0.01)
            found = listening()
        reunion.meet().close()
        return found

    assert on_ranks(3, body)[0] - before[2] <= {"127.0.0.1"}
    assert (process.num_fds(), threading.active_count(), listening()) == before
