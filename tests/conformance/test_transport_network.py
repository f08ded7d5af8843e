"""What every transport between processes must do: rendezvous, and peers that die or stop."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
import torch
from tests.transport.groups import CLASSES, NETWORK_KINDS, run_threads, within

from isthmus.spec.errors import IsthmusError
from isthmus.transport.errors import PeerLostError, RendezvousError
from isthmus.transport.rendezvous import listen

pytestmark = pytest.mark.parametrize("kind", NETWORK_KINDS)
MEGABYTES = 4


def connect_all(kind: str, ranks: list[dict[str, Any]], body: Callable[[Any], Any] = lambda group: None) -> list[Any]:
    """What ``body`` returned, or connecting raised, for each of ``ranks`` (arguments of ``connect``)."""
    with listen("127.0.0.1") as listener:
        common = {"port": listener.getsockname()[1], "timeout_s": 5.0}

        def run(options: dict[str, Any]) -> Any:
            options = common | options | ({"listener": listener} if options["rank"] == 0 else {})
            return within(CLASSES[kind].connect(**options), body)

        return run_threads([functools.partial(run, options) for options in ranks])


# --- rendezvous -------------------------------------------------------------------------------------------------------


def test_different_digests_end_every_rank_with_who_differs_and_in_what(kind: str) -> None:
    digests = ["llama-7f", "llama-7f", "bert-01"]
    found = connect_all(kind, [{"rank": r, "world_size": 3, "digest": digest} for r, digest in enumerate(digests)])
    for error in found:
        assert isinstance(error, RendezvousError)
        assert "rank 2 has digest 'bert-01', rank 0 'llama-7f'" in str(error) and "rank 1" not in str(error)


def test_different_world_sizes_and_ranks_given_twice_are_told(kind: str) -> None:
    found = connect_all(
        kind, [{"rank": 0, "world_size": 2}, {"rank": 1, "world_size": 3}, {"rank": 2, "world_size": 3}]
    )
    assert all("rank 1 has world_size 3, rank 0 2" in str(error) for error in found[:2]), found
    found = connect_all(kind, [{"rank": r, "world_size": 3} for r in (0, 1, 1)])
    assert all("2 processes are rank 1" in str(error) for error in found), found


def test_ranks_that_do_not_come_are_named_on_every_rank(kind: str) -> None:
    found = connect_all(kind, [{"rank": r, "world_size": 4, "timeout_s": 0.5} for r in (0, 2)])
    assert all(isinstance(error, RendezvousError) and "ranks 1, 3 of 4 missing" in str(error) for error in found), found


def test_without_rank_0_the_others_say_so(kind: str, port: int) -> None:
    with pytest.raises(RendezvousError, match=f"rank 0 is missing: nothing at 127.0.0.1:{port}"):
        CLASSES[kind].connect(rank=1, world_size=2, port=port, timeout_s=0.3)


def test_a_port_that_is_taken_says_what_to_change(kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(RendezvousError, match=r"a free port \(MASTER_ADDR and MASTER_PORT of rank 0"):
            CLASSES[kind].connect(rank=0, world_size=2, port=taken.getsockname()[1], timeout_s=0.3)


def test_strangers_at_the_door_change_nothing(kind: str) -> None:
    with listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
        strangers[1].sendall(b"isthmus\n\xff\xff\xff\xff")  # a length of 4 GiB
        strangers[2].sendall(b"isthmus\n\x02\x00\x00\x00[]")
        try:

            def run(rank: int) -> float:
                options = {"listener": listener} if rank == 0 else {}
                with CLASSES[kind].connect(rank=rank, world_size=2, port=port, timeout_s=20, **options) as group:
                    tensor = torch.ones(1)
                    group.all_reduce(tensor)
                    return tensor.item()

            assert run_threads([lambda: run(0), lambda: run(1)]) == [2.0, 2.0]
        finally:
            for stranger in strangers:
                stranger.close()


def test_nothing_listens_on_all_interfaces_and_nothing_at_all_once_connected_over_sockets(kind: str) -> None:
    def listening(group: Any = None) -> set[tuple[str, int]]:
        if group is not None:
            group.all_reduce(torch.zeros(1))
        found = psutil.Process().net_connections()
        if group is not None:
            group.all_reduce(torch.zeros(1))
        return {(each.laddr.ip, each.laddr.port) for each in found if each.status == psutil.CONN_LISTEN}

    before = listening()  # what an earlier test's gloo has not yet given back
    first, second = connect_all(kind, [{"rank": rank, "world_size": 2} for rank in range(2)], listening)
    assert {address for address, _ in first | second} <= {"127.0.0.1"}
    if kind == "sockets":
        assert first | second <= before


def test_the_environment_of_torchrun_is_understood(kind: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with CLASSES[kind].from_environment() as group:
        assert (group.rank, group.world_size) == (0, 1)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(IsthmusError, match="RANK: got 'first', wanted a number"):
        CLASSES[kind].from_environment()


# --- processes that are lost ------------------------------------------------------------------------------------------


def exchange_for_ever(kind: str, rank: int, port: int, report: Connection) -> None:
    """A process: gathers large tensors until something ends it, and reports the first success and the error."""
    torch.set_num_threads(1)
    group = CLASSES[kind].connect(rank=rank, world_size=3, port=port, timeout_s=2.0)
    tensor, outputs = torch.zeros(MEGABYTES << 18), [torch.zeros(MEGABYTES << 18) for _ in range(3)]
    try:
        group.all_gather(outputs, tensor)
        report.send("running")
        while True:
            group.all_gather(outputs, tensor)
    except PeerLostError as error:
        report.send(error.ranks)


@pytest.fixture
def processes(kind: str, port: int) -> Iterator[list[tuple[Any, Connection]]]:
    """Three ranks in the midst of it, each with the end of a pipe."""
    # Each starts with torch imported, and without the threads of this process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.transport.groups"])
    started = []
    try:
        for rank in range(3):
            ours, theirs = context.Pipe()
            process = context.Process(target=exchange_for_ever, args=(kind, rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        for _, pipe in started:
            assert pipe.poll(60) and pipe.recv() == "running"
        yield started
    finally:
        for process, pipe in started:
            process.kill()
            process.join()
            pipe.close()


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_stops_amid_a_collective_ends_all_others(
    kind: str, signal_number: int, processes: list[tuple[Any, Connection]]
) -> None:
    os.kill(processes[1][0].pid, signal_number)
    lost = []
    for rank in (0, 2):
        process, pipe = processes[rank]
        assert pipe.poll(30), f"rank {rank} hangs"
        lost.append(pipe.recv())
        process.join(30)
        assert process.exitcode == 0
    assert any(1 in ranks for ranks in lost)
    if kind == "sockets" and signal_number == signal.SIGSTOP:
        # A survivor whose time is up a moment before the other's may name that one too, which waits like it.
        assert all(1 in ranks for ranks in lost)
