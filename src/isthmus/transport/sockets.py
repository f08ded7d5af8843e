"""A group over TCP: one connection between every two ranks, one message per exchange and direction.

A small exchange costs two system calls per peer: each message is handed to the kernel whole, then each peer's is read
in turn. What the kernel does not take at once (large messages) goes through one loop that sends to and receives from
all peers as they are ready, so that exchanges of any size cannot deadlock. Nothing spins: with a CPU quota that would
cost the time that it is meant to save.

Connections are neither encrypted nor authenticated: for networks that are trusted.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from isthmus.transport.agent import agreed_port, is_port_held_by_agent
from isthmus.transport.base import Group
from isthmus.transport.endpoint import Parts
from isthmus.transport.errors import MismatchError, PeerLostError, rank_names
from isthmus.transport.messages import HEADER_BYTES, Operation, complete_header, describe, pack_goodbye, unpack_goodbye
from isthmus.transport.rendezvous import (
    Address,
    Meeting,
    connect_all,
    has_left,
    keep_alive,
    listen,
    local_address,
    meet,
    read_environment,
)
from isthmus.transport.repeated import DoublingSum, RepeatedSum

# Up to here the kernel holds what is not read yet (its receive buffers start at 128 KiB and only some of it is data).
_STRAIGHT_BYTES = 48 << 10
_ADDRESS_BYTES = 64
_WATCHED_BYTES = 8 << 10
"""That a link's rate can be told from."""


class SocketGroup(Group):
    """A group whose ranks are connected by TCP. Made by ``connect`` or ``from_environment``."""

    def __init__(
        self,
        *,
        rank: int,
        connections: dict[int, socket.socket],
        secret: str,
        timeout_s: float,
        global_ranks: tuple[int, ...],
    ) -> None:
        super().__init__(rank=rank, world_size=len(global_ranks), timeout_s=timeout_s, global_ranks=global_ranks)
        self._connections = connections
        self._secret = secret
        self._headers = {peer: bytearray(HEADER_BYTES) for peer in connections}
        self._unfinished: set[int] = set()
        """Peers to which half a message was sent: a goodbye would be read as its rest."""
        self._hung_up = False
        limit = struct.pack("ll", *divmod(max(1, int(timeout_s * 1e6)), 1_000_000))  # 0 would be no limit
        for connection in connections.values():
            connection.setblocking(True)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(connection)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    @classmethod
    def connect(
        cls,
        *,
        rank: int,
        world_size: int,
        address: str = "127.0.0.1",
        port: int,
        digest: str = "",
        timeout_s: float = 60.0,
        listener: socket.socket | None = None,
    ) -> Self:
        """Meets the other ranks at ``address:port``, where rank 0 listens, and connects to each. Blocks.

        Each rank listens, until all are connected, on the interface through which it reaches rank 0. ``digest``: what
        all must agree on. ``listener``: rank 0's, where it listens already. Raises ``RendezvousError`` when ranks are
        missing after ``timeout_s``, do not agree, or the address cannot be listened on.
        """
        meeting = Meeting(
            rank=rank, world_size=world_size, address=address, port=port, digest=digest, timeout_s=timeout_s
        )
        own_address = local_address(meeting)
        host = (listener or listen(address, port)) if rank == 0 else None
        try:
            with listen(own_address) as own:
                own_port = own.getsockname()[1]
                member = meet(meeting, {"address": own_address, "port": own_port}, host)
                addresses = [(str(each["address"]), int(each["port"])) for each in member.details]
                addresses[0] = (address, addresses[0][1])  # as it is called from here, also if it listens everywhere
                connections = connect_all(rank, addresses, own, member.secret, timeout_s, range(world_size))
        finally:
            if host is not None:
                host.close()
        return cls(
            rank=rank,
            connections=connections,
            secret=member.secret,
            timeout_s=timeout_s,
            global_ranks=tuple(range(world_size)),
        )

    @classmethod
    def from_environment(cls, *, digest: str = "", timeout_s: float = 60.0) -> Self:
        """``connect`` with torchrun's variables: RANK, WORLD_SIZE, MASTER_PORT, and MASTER_ADDR (127.0.0.1 without
        it). Under torchrun itself, whose agent holds that port, rank 0 takes another and tells it through the
        agent."""
        environment = read_environment()
        if not is_port_held_by_agent():
            return cls.connect(**environment, digest=digest, timeout_s=timeout_s)
        with agreed_port(environment, timeout_s) as (port, listener):
            environment["port"] = port
            return cls.connect(**environment, digest=digest, timeout_s=timeout_s, listener=listener)

    def subgroup(self, ranks: Sequence[int]) -> SocketGroup:
        members = self._check_members(ranks)
        connections: dict[int, socket.socket] = {}
        if len(members) > 1:
            with listen(self.addresses(self.rank)[0]) as own:
                addresses = self._announce(members, own.getsockname()[:2])
                names = [self.global_ranks[member] for member in members]
                index = members.index(self.rank)
                others = {peer: self._connections[member] for peer, member in enumerate(members) if peer != index}
                connections = connect_all(
                    index, addresses, own, self._secret, self.timeout_s, names, lambda peer: has_left(others[peer])
                )
        return SocketGroup(
            rank=members.index(self.rank),
            connections=connections,
            secret=self._secret,
            timeout_s=self.timeout_s,
            global_ranks=tuple(self.global_ranks[member] for member in members),
        )

    def addresses(self, peer: int) -> tuple[str, str]:
        """This rank's address, and ``peer``'s as it is called from here (its own for this rank itself)."""
        connection = self._connections[peer if peer != self.rank else self.peers[0]]
        own = connection.getsockname()[0]
        return own, own if peer == self.rank else connection.getpeername()[0]

    def has_left(self, peer: int) -> bool:
        """Whether ``peer`` has hung up, as far as is known without a message from it."""
        return has_left(self._connections[peer])

    def await_message(self, source: int) -> None:
        self.begin_exchange()  # raises if the group has failed
        poll = select.poll()
        poll.register(self._connections[source], select.POLLIN)
        poll.poll()

    def _announce(self, members: tuple[int, ...], address: Address) -> list[Address]:
        """Tells ``members`` where this rank listens, and returns where each of them does."""
        texts = {member: bytearray(_ADDRESS_BYTES) for member in members}
        texts[self.rank][:] = f"{address[0]} {address[1]}".encode().ljust(_ADDRESS_BYTES)
        outgoing = [(member, memoryview(texts[self.rank])) for member in members if member != self.rank]
        incoming = [(member, memoryview(texts[member])) for member in members if member != self.rank]
        tag = sum(1 << member for member in members) & 0xFFFF
        self._run(lambda _: self.transfer(self.begin_call(Operation.SUBGROUP, 0, tag), outgoing, incoming))
        pairs = (text.decode().split() for text in texts.values())
        return [(host, int(port)) for host, port in pairs]

    # --- messages -----------------------------------------------------------------------------------------------------

    def _exchange(self, prefix: bytes, outgoing: Parts, incoming: Parts) -> None:
        unsent = []
        for peer, payload in outgoing:
            rest = self._send_some(peer, [complete_header(prefix, len(payload)), payload])
            if rest:
                unsent.append((peer, rest))
        if not unsent and sum(len(payload) for _, payload in incoming) <= _STRAIGHT_BYTES:
            for peer, payload in incoming:
                self._receive(peer, complete_header(prefix, len(payload)), payload)
        else:
            _Loop(self, prefix, unsent, incoming).run()

    def _send_some(self, peer: int, buffers: list) -> list[memoryview]:
        """Hands the kernel what it takes without blocking and returns the rest."""
        try:
            num_sent = self._connections[peer].sendmsg(buffers, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            num_sent = 0
        except OSError as error:
            raise self._lost(peer, error) from error
        rest = []
        for buffer in buffers:
            if num_sent < len(buffer):
                rest.append(memoryview(buffer)[num_sent:])
            num_sent = max(0, num_sent - len(buffer))
        if rest:
            self._unfinished.add(peer)
        else:
            self._unfinished.discard(peer)
        return rest

    def _receive(self, peer: int, wanted: bytes, payload: memoryview) -> None:
        """Blocks for one message. The kernel keeps the time limit (SO_RCVTIMEO)."""
        header, connection = self._headers[peer], self._connections[peer]
        got = 0
        while got < HEADER_BYTES + len(payload):
            try:
                if got == 0:
                    got = num_bytes = connection.recvmsg_into([header, payload])[0]
                else:
                    num_bytes = self._receive_rest(peer, payload, got)
                    got += num_bytes
            except BlockingIOError as error:
                raise self._silent([peer]) from error
            except OSError as error:
                raise self._lost(peer, error) from error
            if num_bytes == 0:
                raise self._lost(peer, None)
            if got >= HEADER_BYTES and header != wanted:
                raise self._unexpected(peer, header, wanted)

    def _receive_rest(self, peer: int, payload: memoryview, got: int, flags: int = 0) -> int:
        """Reads on where ``got`` bytes of header and payload have come."""
        connection = self._connections[peer]
        if got < HEADER_BYTES:
            return connection.recvmsg_into([memoryview(self._headers[peer])[got:], payload], 0, flags)[0]
        return connection.recv_into(payload[got - HEADER_BYTES :], 0, flags)

    # --- for sums that are repeated (``repeated``): header and payload in one piece of memory ------------------------

    def repeated_sum(self, num_values: int) -> RepeatedSum:
        if self.world_size & (self.world_size - 1) or 4 * num_values > _STRAIGHT_BYTES:
            return super().repeated_sum(num_values)
        return DoublingSum(
            self,
            num_values,
            run=self._run,
            exchange=self._exchange_message,
            sockets={peer: connection.fileno() for peer, connection in self._connections.items()},
            silent=self._silent,
        )

    def _exchange_message(
        self, peer: int, prefix: bytes, outgoing: memoryview, incoming: memoryview, num_sent: int, got: int
    ) -> None:
        """Sends a message and receives one that must have the same header, of each of which so much is done."""
        connection = self._connections[peer]
        if num_sent < len(outgoing):
            try:
                num_sent += connection.send(outgoing[num_sent:], socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._lost(peer, error) from error
        if num_sent < len(outgoing):
            self._unfinished.add(peer)
            _Loop(self, prefix, [(peer, [outgoing[num_sent:]])], [(peer, incoming[HEADER_BYTES:])]).run()
            return
        while True:
            if got >= HEADER_BYTES and incoming[:HEADER_BYTES] != outgoing[:HEADER_BYTES]:
                raise self._unexpected(peer, bytearray(incoming[:HEADER_BYTES]), bytes(outgoing[:HEADER_BYTES]))
            if got == len(incoming):
                return
            try:
                num_bytes = connection.recv_into(incoming[got:])
            except BlockingIOError as error:
                raise self._silent([peer]) from error
            except OSError as error:
                raise self._lost(peer, error) from error
            if num_bytes == 0:
                raise self._lost(peer, None)
            got += num_bytes

    def _hang_up(self, lost_ranks: tuple[int, ...]) -> None:
        if self._hung_up:
            return
        self._hung_up = True
        for peer, connection in self._connections.items():
            with suppress(OSError):  # the peer may be gone already
                if peer not in self._unfinished:
                    connection.send(pack_goodbye(lost_ranks), socket.MSG_DONTWAIT)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes whoever is blocked on it; close alone would not
            connection.close()

    # --- errors -------------------------------------------------------------------------------------------------------

    def _lost(self, peer: int, error: OSError | None) -> PeerLostError | MismatchError:
        """The connection to ``peer`` is broken. A goodbye that it has sent before says more."""
        if self._is_closed:
            return PeerLostError("the group was closed while a call was under way")
        header = bytearray()
        try:
            while len(header) < HEADER_BYTES and (
                piece := self._connections[peer].recv(HEADER_BYTES - len(header), socket.MSG_DONTWAIT)
            ):
                header += piece
        except OSError:
            header.clear()
        if len(header) == HEADER_BYTES and unpack_goodbye(bytes(header)) is not None:
            return self._unexpected(peer, header, b"")
        rank = self.global_ranks[peer]
        reason = "hung up" if error is None else error.strerror or str(error)
        return PeerLostError(f"rank {rank} is lost: {reason}: see its output, then start all again", [rank])

    def _silent(self, peers: Sequence[int]) -> PeerLostError:
        ranks = [self.global_ranks[peer] for peer in peers]
        return PeerLostError(
            f"{rank_names(ranks)} lost: nothing for {self.timeout_s:g} s: hangs, waits for one that does, or needs a "
            "longer time limit (timeout_s)",
            ranks,
        )

    def _unexpected(self, peer: int, header: bytearray, wanted: bytes) -> PeerLostError | MismatchError:
        rank = self.global_ranks[peer]
        lost = unpack_goodbye(bytes(header))
        if lost:
            return PeerLostError(f"{rank_names(lost)} lost, says rank {rank}, and left", lost)
        if lost is not None:
            return PeerLostError(f"rank {rank} is lost: it has left the group: see its output", [rank])
        return MismatchError(
            f"rank {rank} sent {describe(bytes(header))}, rank {self.global_ranks[self.rank]} wanted "
            f"{describe(wanted)}: all ranks must make the same calls in the same order, with the same sizes"
        )


class _Loop:
    """One exchange of large messages: sends and receives wherever it is possible, until all is done."""

    def __init__(
        self, group: SocketGroup, prefix: bytes, unsent: list[tuple[int, list[memoryview]]], incoming: Parts
    ) -> None:
        self._group = group
        self._unsent = dict(unsent)
        self._wanted = {peer: (complete_header(prefix, len(payload)), payload) for peer, payload in incoming}
        self._got = dict.fromkeys(self._wanted, 0)
        self._first: dict[int, tuple[int, float]] = {}
        """What of a peer's message was there at once, and when."""
        self._progress_s = dict.fromkeys({*self._unsent, *self._wanted}, time.monotonic())

    def run(self) -> None:
        group = self._group
        poll = select.poll()
        by_fd = {group._connections[peer].fileno(): peer for peer in self._progress_s}
        for fd, peer in by_fd.items():
            poll.register(fd, self._events(peer))
        while self._progress_s:
            now_s = time.monotonic()
            limit_s = min(self._progress_s.values()) + group.timeout_s
            if now_s >= limit_s:
                silent = [peer for peer, at_s in self._progress_s.items() if at_s + group.timeout_s <= now_s]
                raise group._silent(silent)
            for fd, events in poll.poll((limit_s - now_s) * 1e3 + 1):
                peer = by_fd[fd]
                before = self._events(peer)
                if events & ~select.POLLOUT and peer in self._wanted:
                    self._receive_some(peer)
                if events & ~select.POLLIN and peer in self._unsent:
                    self._send_some(peer)
                self._progress_s[peer] = time.monotonic()
                after = self._events(peer)
                if not after:
                    poll.unregister(fd)
                    del self._progress_s[peer]
                elif after != before:
                    poll.modify(fd, after)

    def _events(self, peer: int) -> int:
        return (select.POLLIN if peer in self._wanted else 0) | (select.POLLOUT if peer in self._unsent else 0)

    def _send_some(self, peer: int) -> None:
        rest = self._group._send_some(peer, self._unsent[peer])
        if rest:
            self._unsent[peer] = rest
        else:
            del self._unsent[peer]

    def _receive_some(self, peer: int) -> None:
        group = self._group
        header, payload = self._wanted[peer]
        try:
            num_bytes = group._receive_rest(peer, payload, self._got[peer], socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise group._lost(peer, error) from error
        if num_bytes == 0:
            raise group._lost(peer, None)
        self._got[peer] += num_bytes
        num_first, first_s = self._first.setdefault(peer, (self._got[peer], time.perf_counter()))
        if self._got[peer] >= HEADER_BYTES and group._headers[peer] != header:
            raise group._unexpected(peer, group._headers[peer], header)
        if self._got[peer] == HEADER_BYTES + len(payload):
            del self._wanted[peer]
            if self._got[peer] - num_first >= _WATCHED_BYTES:
                group.note_arrival(peer, self._got[peer] - num_first, time.perf_counter() - first_s)
