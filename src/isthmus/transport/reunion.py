"""How the ranks of a group that are left meet again when some of them are lost.

A group that has lost a rank is of no more use on any rank. Every rank keeps one more connection, to rank 0, from the
first meeting on; nothing goes over it while all is well. Those that are left say so there (``Reunion.meet``), a rank
whose connection has ended is lost, and the others become a new group. Rank 0 itself cannot be replaced.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from isthmus.transport.errors import RendezvousError
from isthmus.transport.rendezvous import connect_all, introduced, listen, receive_frame, send_frame
from isthmus.transport.sockets import SocketGroup

_FRAME_S = 5.0
_FOREVER_S = 1e7
"""Rank 0 may notice only at its next request that a rank is lost; the others wait for it. If it ends, they learn so."""


@dataclass
class Reunion:
    """Made by ``prepare`` on all ranks of a group alike. ``close`` it, or use it as a context manager."""

    rank: int
    """In the group that was connected first, as are all others here."""
    members: tuple[int, ...]
    """Of the group that met last."""
    timeout_s: float
    own_address: str
    host_address: str
    """Rank 0's, as it is called from here."""
    connections: dict[int, socket.socket] = field(default_factory=dict)
    """Rank 0's to all others, the others' to rank 0."""

    @classmethod
    def prepare(cls, group: SocketGroup) -> Self:
        """Called on all ranks of a group of several; blocks until each has its connection to rank 0."""
        own_address, host_address = group.addresses(0)
        made = cls(
            rank=group.global_ranks[group.rank],
            members=group.global_ranks,
            timeout_s=group.timeout_s,
            own_address=own_address,
            host_address=host_address,
        )
        told = torch.zeros(17, dtype=torch.int64)
        if group.rank == 0:
            with listen(own_address) as listener:
                told[0] = listener.getsockname()[1]
                told[1:] = torch.tensor(list(secrets.token_bytes(16)))
                group.broadcast(told)
                made._accept(listener, bytes(told[1:].tolist()).hex())
        else:
            group.broadcast(told)
            port, *secret = told.tolist()
            made.connections[0] = socket.create_connection((host_address, port), group.timeout_s)
            send_frame(made.connections[0], {"secret": bytes(secret).hex(), "rank": made.rank})
        for connection in made.connections.values():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for connection in self.connections.values():
            connection.close()
        self.connections.clear()

    def meet(self) -> SocketGroup:
        """The group of those that are left, in the order of the first one. Called on each of them; blocks.

        Rank 0 waits ``timeout_s`` for ranks that are still connected, the others for rank 0 as long as it runs. Raises
        ``RendezvousError`` when rank 0 is gone or has gone on without this one.
        """
        with listen(self.own_address) as own:
            address = [self.own_address, own.getsockname()[1]]
            answer = self._gather(address) if self.rank == 0 else self._ask(address)
            self.members = tuple(rank for rank, _, _ in answer["members"])
            secret, index = str(answer["secret"]), self.members.index(self.rank)
            addresses = [(str(host), int(port)) for _, host, port in answer["members"]]
            addresses[0] = (self.host_address, addresses[0][1])
            connections = connect_all(index, addresses, own, secret, self.timeout_s, self.members)
        return SocketGroup(
            rank=index,
            connections=connections,
            secret=secret,
            timeout_s=self.timeout_s,
            global_ranks=self.members,
        )

    def _accept(self, listener: socket.socket, secret: str) -> None:
        deadline_s = time.monotonic() + self.timeout_s
        while missing := set(self.members) - self.connections.keys() - {self.rank}:
            listener.settimeout(max(0.001, deadline_s - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError as error:
                raise RendezvousError(f"ranks {sorted(missing)} have not come back to rank 0") from error
            rank = introduced(connection, secret, deadline_s)
            if rank in missing:
                self.connections[rank] = connection
            else:
                connection.close()

    def _ask(self, address: list[Any]) -> dict[str, Any]:
        try:
            send_frame(self.connections[0], {"address": address})
            return receive_frame(self.connections[0], time.monotonic() + _FOREVER_S)
        except (OSError, ValueError, KeyError) as error:
            self.close()
            raise RendezvousError(
                f"rank 0 is lost, or has gone on without rank {self.rank} ({error}): see its output"
            ) from error

    def _gather(self, address: list[Any]) -> dict[str, Any]:
        """Rank 0: who is left and where each listens, which all of them are told."""
        places: dict[int, list[Any]] = {self.rank: address}
        deadline_s = time.monotonic() + self.timeout_s
        with selectors.DefaultSelector() as selector:
            for rank, connection in self.connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map() and (left_s := deadline_s - time.monotonic()) > 0:
                for key, _ in selector.select(left_s):
                    selector.unregister(key.fileobj)
                    hello = self._heard(key.data)
                    if hello is not None:
                        places[key.data] = hello
        answer = {"members": [[rank, *places[rank]] for rank in sorted(places)], "secret": secrets.token_hex(16)}
        for rank in set(self.connections) - set(places):
            self.connections.pop(rank).close()  # so that one that comes too late learns of it
        for rank, connection in self.connections.items():
            try:
                connection.settimeout(self.timeout_s)
                send_frame(connection, answer)
            except OSError as error:
                raise RendezvousError(f"rank {rank} was lost too, while those that are left met ({error})") from error
        return answer

    def _heard(self, rank: int) -> list[Any] | None:
        """Where ``rank`` listens; None: it is lost."""
        try:
            host, port = receive_frame(self.connections[rank], time.monotonic() + _FRAME_S)["address"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return [host, port]
