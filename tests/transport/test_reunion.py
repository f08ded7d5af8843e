"""Ranks that meet again after some are lost: real processes, killed at any moment, and what is left becomes a group."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.transport.groups import run_threads

from isthmus.transport.errors import PeerLostError, RendezvousError
from isthmus.transport.rendezvous import listen
from isthmus.transport.reunion import Reunion
from isthmus.transport.sockets import SocketGroup


def on_ranks(world_size: int, body: Callable[[SocketGroup, Reunion], Any], timeout_s: float = 10.0) -> list[Any]:
    """What ``body`` returned or raised on each rank, which is a thread."""
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
    start_s = time.monotonic()
    found = on_ranks(4, body)
    assert [each for rank, each in enumerate(found) if rank not in lost] == [(left, float(sum(left)))] * len(left)
    assert time.monotonic() - start_s < 8  # nobody waits for the time limit


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


def test_without_rank_0_nobody_goes_on() -> None:
    def body(group: SocketGroup, reunion: Reunion) -> Any:
        if group.rank == 0:
            return None
        group.close()
        return reunion.meet()

    for error in on_ranks(3, body)[1:]:
        assert isinstance(error, RendezvousError) and "rank 0 is lost, or has gone on without rank" in str(error)


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

    *found, late = on_ranks(3, body, timeout_s=1.0)
    assert found == [(0, 1)] * 2 and isinstance(late, RendezvousError)
