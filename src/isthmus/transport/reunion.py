"""How the ranks of a group that are left meet again when some of them are lost.

A group that has lost a rank is of no more use on any rank. Every rank keeps one more connection, to rank 0, from the
first meeting on; nothing goes over it while all is well. Those that are left say so there (``Reunion.meet``), a rank
whose connection has ended, or whose process does not answer, is lost, and the others become a new group. Rank 0 itself
cannot be replaced.

A thread listens on each rank, so that a process that only computes, or waits for a user, can be told from one that is
stopped or cut off.
"""

from __future__ import annotations

import math
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Self

import torch

from isthmus.transport.errors import EndedError, PeerLostError, RendezvousError, TransportError, rank_names
from isthmus.transport.rendezvous import (
    LOOK_S,
    connect_all,
    introduced,
    keep_alive,
    listen,
    missing_bytes,
    parse_frame,
    send_frame,
)
from isthmus.transport.sockets import SocketGroup

_SILENT_S = 10.0
"""A process that runs answers in milliseconds. One that does not in this time is lost (or in a shorter time limit)."""
_LIMITS = 2
"""So many time limits rank 0 waits for one that runs but does not come: it may have begun to wait for a lost one only
when rank 0 had given it up."""
_PING = {"ping": True}
_PONG = {"pong": True}


class Reunion:
    """One rank's end. Made by ``prepare`` on all ranks of a group alike. A context manager."""

    def __init__(self, group: SocketGroup, connections: dict[int, socket.socket]) -> None:
        """``connections``: rank 0's to all others, the others' to rank 0, by rank in the group that was connected
        first, as are all numbers here."""
        self.rank = group.global_ranks[group.rank]
        self.members = group.global_ranks
        """Of the group that met last."""
        self.timeout_s = group.timeout_s
        self._own_address, self._host_address = group.addresses(0)
        self._silent_s = min(_SILENT_S, group.timeout_s)
        self._connections = connections
        self._received = dict.fromkeys(connections, b"")
        self._said: dict[int, dict[str, Any]] = {}
        """What came last from a rank, until it is taken."""
        self._heard_s = dict.fromkeys(connections, 0.0)
        self._changed, self._sending = threading.Condition(), threading.Lock()
        for connection in connections.values():
            keep_alive(connection)
            connection.settimeout(self._silent_s)
        self._thread = threading.Thread(
            target=self._listen, args=(dict(connections),), name="isthmus-reunion", daemon=True
        )
        self._thread.start()

    @classmethod
    def prepare(cls, group: SocketGroup) -> Self:
        """Called on all ranks of a group of several; blocks until each has its connection to rank 0. Raises
        ``TransportError`` where that fails."""
        own_address, host_address = group.addresses(0)
        told = torch.zeros(17, dtype=torch.int64)
        if group.rank == 0:
            with listen(own_address) as listener:
                told[0] = listener.getsockname()[1]
                told[1:] = torch.tensor(list(secrets.token_bytes(16)))
                group.broadcast(told)
                return cls(group, _accept(listener, bytes(told[1:].tolist()).hex(), group))
        group.broadcast(told)
        port, *secret = told.tolist()
        rank = group.global_ranks[group.rank]
        try:
            connection = socket.create_connection((host_address, port), group.timeout_s)
            send_frame(connection, {"secret": bytes(secret).hex(), "rank": rank})
        except OSError as error:
            raise RendezvousError(f"rank {rank} cannot reach rank 0 at {host_address}:{port} ({error})") from error
        return cls(group, {0: connection})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Nobody meets again. Others that want to are told by rank 0 that it has ended, and if it has failed."""
        with self._changed:
            connections = dict(self._connections)
        for rank, connection in connections.items():
            if self.rank == 0:
                self._send(rank, {"ended": str(error) if isinstance(error, TransportError) else ""})
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # which ends the thread
        self._thread.join()

    def meet(self) -> SocketGroup:
        """The group of those that are left, in the order of the first one. Called on each of them; blocks.

        Rank 0 waits for ranks whose processes answer, for two time limits at most; the others wait for rank 0 as long
        as it answers, as it may notice only at its next request that a rank is lost. Raises ``PeerLostError`` where
        another one is lost meanwhile: then all that are left are to call this once more; ``RendezvousError`` when rank
        0 is lost or has gone on without this one; ``EndedError`` when it has ended in order.
        """
        with listen(self._own_address) as own:
            address = [self._own_address, own.getsockname()[1]]
            answer = self._gather(address) if self.rank == 0 else self._ask(address)
            members = tuple(rank for rank, _, _ in answer["members"])
            secret, index = str(answer["secret"]), members.index(self.rank)
            addresses = [(str(host), int(port)) for _, host, port in answer["members"]]
            addresses[0] = (self._host_address, addresses[0][1])
            connections = connect_all(index, addresses, own, secret, self.timeout_s, members, self._is_lost(members))
        group = SocketGroup(
            rank=index, connections=connections, secret=secret, timeout_s=self.timeout_s, global_ranks=members
        )
        group.all_reduce(torch.zeros(1))  # or one that is lost by now would be noticed in a request only
        self.members = members
        return group

    # --- rank 0 -------------------------------------------------------------------------------------------------------

    def _gather(self, address: list[Any]) -> dict[str, Any]:
        """Who is left and where each listens, which all of them are told."""
        self._wait(lambda: self._connections.keys() <= self._said.keys(), _LIMITS * self.timeout_s)
        with self._changed:
            for rank in self._connections.keys() - self._said.keys():
                self._drop(rank)  # one that comes too late learns of it
            places = {rank: said["address"] for rank, said in self._said.items() if rank in self._connections}
            self._said.clear()
        members = [[rank, *place] for rank, place in sorted({**places, self.rank: address}.items())]
        answer = {"members": members, "secret": secrets.token_hex(16)}
        for rank in places:
            self._send(rank, answer)
        return answer

    def _is_lost(self, members: Sequence[int]) -> Callable[[int], bool]:
        """By its number among ``members``. Rank 0 sees it; the others see that rank 0 hangs up."""
        return lambda peer: self.rank == 0 and members[peer] not in self._connections

    # --- the others ---------------------------------------------------------------------------------------------------

    def _ask(self, address: list[Any]) -> dict[str, Any]:
        self._send(0, {"address": address})
        self._wait(lambda: 0 in self._said, math.inf)
        with self._changed:
            answer = self._said.get(0, {})
            if "members" in answer:
                return self._said.pop(0)
        if answer.get("ended") == "":
            raise EndedError("rank 0 has ended")
        if "ended" in answer:
            raise RendezvousError(f"rank 0 has ended: {answer['ended']}")
        raise RendezvousError(f"rank 0 is lost, or has gone on without rank {self.rank}: see its output")

    # --- everybody ----------------------------------------------------------------------------------------------------

    def _wait(self, is_done: Callable[[], bool], limit_s: float) -> None:
        """Until it is so, nobody is left to wait for, or the time is up. Those that do not answer are dropped."""
        with self._changed:
            start_s = time.monotonic()
            self._heard_s = dict.fromkeys(self._connections, start_s)
            while not is_done() and self._connections and time.monotonic() < start_s + limit_s:
                for rank, heard_s in self._heard_s.items():
                    if rank in self._connections and rank not in self._said:
                        if time.monotonic() > heard_s + self._silent_s:
                            self._drop(rank)
                        else:
                            self._send(rank, _PING)
                self._changed.wait(self._silent_s / 8)

    def _send(self, rank: int, content: dict[str, Any]) -> None:
        connection = self._connections.get(rank)
        with self._sending, suppress(OSError):  # that it is lost will be heard
            if connection is not None:
                send_frame(connection, content)

    def _drop(self, rank: int) -> None:
        with suppress(OSError):
            self._connections.pop(rank).shutdown(socket.SHUT_RDWR)  # the thread closes it

    def _listen(self, connections: dict[int, socket.socket]) -> None:
        """The thread: takes what comes until every connection has ended."""
        with selectors.DefaultSelector() as selector:
            for rank, connection in connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    try:
                        self._hear(key.data, connections[key.data])
                    except (OSError, ValueError):
                        selector.unregister(key.fileobj)
                        with self._changed:
                            self._connections.pop(key.data, None)
                            self._changed.notify_all()
                        connections[key.data].close()

    def _hear(self, rank: int, connection: socket.socket) -> None:
        piece = connection.recv(missing_bytes(self._received[rank]))
        if not piece:
            raise ConnectionResetError("hung up")
        self._received[rank] += piece
        if missing_bytes(self._received[rank]):
            return
        content = parse_frame(self._received[rank])
        self._received[rank] = b""
        if content == _PING:
            self._send(rank, _PONG)
        with self._changed:
            self._heard_s[rank] = time.monotonic()
            if content not in (_PING, _PONG):
                self._said[rank] = content
                self._changed.notify_all()


def _accept(listener: socket.socket, secret: str, group: SocketGroup) -> dict[int, socket.socket]:
    """Rank 0's connections to all others, by their numbers in the first group."""
    deadline_s = time.monotonic() + group.timeout_s
    connections: dict[int, socket.socket] = {}
    while missing := set(group.global_ranks[1:]) - connections.keys():
        left_s = deadline_s - time.monotonic()
        listener.settimeout(max(0.001, min(left_s, LOOK_S)))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            gone = {rank for rank in missing if group.has_left(group.global_ranks.index(rank))}
            if not gone and left_s > LOOK_S:
                continue
            why = "hung up" if gone else f"not back after {group.timeout_s:g} s"
            lost = PeerLostError(f"{rank_names(gone or missing)} lost: {why}", gone or missing)
            for connection in connections.values():
                with suppress(OSError):
                    send_frame(connection, {"ended": str(lost)})
                connection.close()
            raise lost from None
        rank = introduced(connection, secret, deadline_s)
        if rank in missing:
            connections[rank] = connection
        else:
            connection.close()
    return connections
