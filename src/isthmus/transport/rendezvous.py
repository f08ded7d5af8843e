"""How ranks find each other and make sure that they are about to do the same thing.

Rank 0 listens on one address, never on all unless told so. Everybody says who it is, how large the group is and a
digest of what is to run; rank 0 answers all of them once, with everybody's addresses and a secret for the connections
that follow, or with what is wrong. What is sent is JSON of a limited length; connections that speak something else are
dropped.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import selectors
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from isthmus.spec.errors import IsthmusError
from isthmus.transport.errors import PeerLostError, RendezvousError, rank_names
from isthmus.transport.messages import HEADER_BYTES, unpack_goodbye

PROTOCOL = 1
_MAGIC = b"isthmus\n"
_LENGTH = struct.Struct("<I")
_PREAMBLE_BYTES = len(_MAGIC) + _LENGTH.size
_MOST_BYTES = 1 << 16
_RETRY_S = 0.02
_GRACE_S = 0.5
LOOK_S = 0.1
"""So often a rank that waits for others looks whether that is in vain."""

Address = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """What a rank says when it comes, and where."""

    rank: int
    world_size: int
    address: str
    """Host name or address of rank 0."""
    port: int
    digest: str
    """What all must agree on, for instance a hash of model and plan. Shown in errors."""
    timeout_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise IsthmusError(f"rank: got {self.rank} of {self.world_size}, wanted 0 … {self.world_size - 1}")


@dataclass(frozen=True, kw_only=True)
class Membership:
    """What every rank knows after the rendezvous."""

    details: tuple[dict, ...]
    """Rank by rank what it announced."""
    secret: str
    """The same on all ranks and new each time: connections of the group begin with it."""


def read_environment() -> dict[str, Any]:
    """``rank``, ``world_size``, ``address`` and ``port`` from torchrun's RANK, WORLD_SIZE, MASTER_ADDR (127.0.0.1
    without it) and MASTER_PORT. Raises ``IsthmusError`` naming the variable that is missing or no number."""
    return {
        "rank": _number("RANK"),
        "world_size": _number("WORLD_SIZE"),
        "address": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "port": _number("MASTER_PORT"),
    }


def _number(name: str) -> int:
    text = os.environ.get(name)
    if text is None or not text.isdigit():
        raise IsthmusError(
            f"{name}: got {text!r}, wanted a number: start with torchrun, or set RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT"
        )
    return int(text)


def listen(address: str, port: int = 0) -> socket.socket:
    """A listening socket bound to ``address`` only. Raises ``RendezvousError`` when the address is not ours or the port
    taken."""
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family, backlog=64)
    except OSError as error:
        raise RendezvousError(
            f"cannot listen on {address}:{port} ({error}): it must be an address of this machine and a free "
            "port (MASTER_ADDR and MASTER_PORT of rank 0, --listen and --port of a worker)"
        ) from error


@contextmanager
def held_port() -> Iterator[int]:
    """A free port of loopback at which processes that are started meanwhile can meet. Until the end nobody who asks for
    any port is given this one, be it to listen or to connect from: it is bound here, yet not listened on, so whoever
    names it can listen there (if it allows reuse, as ``listen`` and torch do)."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def meet(meeting: Meeting, details: dict, listener: socket.socket | None) -> Membership:
    """Blocks until all ranks have met. ``details`` is JSON that the others get to see; ``listener`` is rank 0's at the
    meeting's address, which stays open. Raises ``RendezvousError`` on every rank: who is missing, who differs and in
    what."""
    hello = {"rank": meeting.rank, "world_size": meeting.world_size, "protocol": PROTOCOL, "digest": meeting.digest}
    hello["details"] = details
    if meeting.rank == 0:
        assert listener is not None
        answer = _Host(meeting, hello, listener).run()
    else:
        answer = _ask(meeting, hello)
    if "error" in answer:
        raise RendezvousError(str(answer["error"]))
    return Membership(details=tuple(answer["details"]), secret=str(answer["secret"]))


def local_address(meeting: Meeting) -> str:
    """The address of the interface through which this host reaches rank 0 (on rank 0: the meeting's). Sends nothing."""
    if meeting.rank == 0:
        return meeting.address
    try:
        return address_towards(meeting.address, meeting.port)
    except OSError as error:
        raise RendezvousError(
            f"no way to rank 0 at {meeting.address} ({error}): check MASTER_ADDR and the network"
        ) from error


def address_towards(host: str, port: int) -> str:
    """The address of this host that ``host`` sees it by. Sends nothing. Raises ``OSError`` where there is no way."""
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


def send_frame(connection: socket.socket, content: dict) -> None:
    text = json.dumps(content).encode()
    if len(text) > _MOST_BYTES:
        raise IsthmusError(f"rendezvous: {len(text)} bytes to say, wanted at most {_MOST_BYTES}: shorten the digest")
    connection.sendall(_MAGIC + _LENGTH.pack(len(text)) + text)


def missing_bytes(received: bytes) -> int:
    """How many more bytes the frame that starts with ``received`` has, as far as is known. Raises ``ValueError`` when
    it is no frame or too long."""
    if not _MAGIC.startswith(received[: len(_MAGIC)]):
        raise ValueError("not isthmus")
    if len(received) < _PREAMBLE_BYTES:
        return _PREAMBLE_BYTES - len(received)
    [num_bytes] = _LENGTH.unpack_from(received, len(_MAGIC))
    missing = _PREAMBLE_BYTES + num_bytes - len(received)
    if num_bytes > _MOST_BYTES or missing < 0:
        raise ValueError("too long")
    return missing


def parse_frame(frame: bytes) -> dict:
    """A whole frame's content. Raises ``ValueError``."""
    content = json.loads(frame[_PREAMBLE_BYTES:])
    if not isinstance(content, dict):
        raise ValueError("not an object")
    return content


def receive_frame(connection: socket.socket, deadline_s: float) -> dict:
    """Reads exactly one frame. Raises ``OSError`` (also when ``deadline_s``, on the monotonic clock, is over) or
    ``ValueError``."""
    received = b""
    while missing := missing_bytes(received):
        connection.settimeout(max(0.001, deadline_s - time.monotonic()))
        piece = connection.recv(missing)
        if not piece:
            raise ConnectionResetError("hung up")
        received += piece
    return parse_frame(received)


def _ask(meeting: Meeting, hello: dict) -> dict:
    deadline_s = time.monotonic() + meeting.timeout_s
    while True:
        try:
            with socket.create_connection((meeting.address, meeting.port), meeting.timeout_s) as connection:
                send_frame(connection, hello)
                # Rank 0 tells who is missing when its own time is up, which may be a little later than ours.
                return receive_frame(connection, deadline_s + min(5.0, meeting.timeout_s))
        except (OSError, ValueError) as error:
            if isinstance(error, IsthmusError):
                raise
            if time.monotonic() > deadline_s:
                raise RendezvousError(
                    f"rank {meeting.rank}: rank 0 is missing: nothing at {meeting.address}:{meeting.port} for "
                    f"{meeting.timeout_s:g} s ({error}): is it started, are MASTER_ADDR and MASTER_PORT right?"
                ) from error
            time.sleep(_RETRY_S)


@dataclass
class _Host:
    """Rank 0's side."""

    meeting: Meeting
    hello: dict
    listener: socket.socket
    _received: dict[socket.socket, bytes] = field(default_factory=dict)
    _guests: list[tuple[socket.socket, dict]] = field(default_factory=list)

    def run(self) -> dict:
        try:
            self._collect()
            answer = self._answer()
            for connection, _ in self._guests:
                try:
                    connection.settimeout(self.meeting.timeout_s)
                    send_frame(connection, answer)
                except OSError:
                    continue  # it is gone: whoever connects to it next will say so
            return answer
        finally:
            for connection in [*self._received, *(connection for connection, _ in self._guests)]:
                connection.close()

    def _collect(self) -> None:
        """Hears everybody out until all are there or the time is up. Nobody can hold up the others."""
        deadline_s = time.monotonic() + self.meeting.timeout_s
        with selectors.DefaultSelector() as selector:
            self.listener.setblocking(False)
            selector.register(self.listener, selectors.EVENT_READ)
            while len(self._guests) < self.meeting.world_size - 1 or self._differences():
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return
                for key, _ in selector.select(left_s):
                    if key.fileobj is self.listener:
                        connection, _ = self.listener.accept()
                        connection.setblocking(False)
                        self._received[connection] = b""
                        selector.register(connection, selectors.EVENT_READ)
                    elif isinstance(key.fileobj, socket.socket):
                        self._hear(selector, key.fileobj)
                if self._differences():
                    # Nothing will come of it: a moment for the others, who are to hear it too.
                    deadline_s = min(deadline_s, time.monotonic() + _GRACE_S)

    def _hear(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        try:
            piece = connection.recv(_MOST_BYTES)
            if not piece:
                raise ConnectionResetError("hung up")
            self._received[connection] += piece
            if missing_bytes(self._received[connection]):
                return
            hello = parse_frame(self._received[connection])
            int(hello["rank"])
            self._guests.append((connection, hello))
            selector.unregister(connection)
        except (OSError, ValueError, KeyError, TypeError):  # a stranger, or somebody who will come again
            selector.unregister(connection)
            connection.close()
        del self._received[connection]

    def _differences(self) -> list[str]:
        hellos = [self.hello, *(hello for _, hello in self._guests)]
        found = [
            f"rank {hello['rank']} has {name} {hello.get(name)!r}, rank 0 {self.hello[name]!r}"
            for hello in hellos
            for name in ("protocol", "world_size", "digest")
            if hello.get(name) != self.hello[name]
        ]
        counts = Counter(int(hello["rank"]) for hello in hellos)
        found += [f"{count} processes are rank {rank}" for rank, count in counts.items() if count > 1]
        wanted = range(self.meeting.world_size)
        return found + [f"rank {rank} is not below {len(wanted)}" for rank in sorted(counts.keys() - set(wanted))]

    def _answer(self) -> dict:
        if found := self._differences():
            return {"error": f"the ranks do not agree: {'; '.join(found)}: start all with the same model and plan"}
        hellos = sorted((self.hello, *(hello for _, hello in self._guests)), key=lambda hello: int(hello["rank"]))
        if missing := set(range(self.meeting.world_size)) - {int(hello["rank"]) for hello in hellos}:
            return {
                "error": f"{rank_names(missing)} of {self.meeting.world_size} missing after "
                f"{self.meeting.timeout_s:g} s: are they started, can they reach "
                f"{self.meeting.address}:{self.meeting.port}?"
            }
        return {"details": [hello.get("details") for hello in hellos], "secret": secrets.token_hex(16)}


def connect_all(
    rank: int,
    addresses: Sequence[Address],
    own: socket.socket,
    secret: str,
    timeout_s: float,
    names: Sequence[int],
    is_lost: Callable[[int], bool] = lambda peer: False,
) -> dict[int, socket.socket]:
    """A connection from ``rank`` to every other: it goes to lower ones, higher ones come to its listener ``own``.

    Who comes must know ``secret``. ``names`` are the ranks' numbers in errors. Raises ``PeerLostError`` when some are
    not there in time, one hangs up before all are there, or ``is_lost`` says so of one that is waited for.
    """
    deadline_s = time.monotonic() + timeout_s
    connections: dict[int, socket.socket] = {}
    try:
        for peer in range(rank):
            connections[peer] = socket.create_connection(addresses[peer], max(0.001, deadline_s - time.monotonic()))
            send_frame(connections[peer], {"secret": secret, "rank": rank})
        while len(connections) < len(addresses) - 1:
            missing = set(range(rank + 1, len(addresses))) - connections.keys()
            if any(map(is_lost, missing)) or any(_peek(connection) == b"" for connection in connections.values()):
                raise ConnectionResetError("another one is lost")
            if time.monotonic() > deadline_s:
                raise TimeoutError("timed out")
            own.settimeout(LOOK_S)
            try:
                connection, _ = own.accept()
            except TimeoutError:
                continue
            peer = introduced(connection, secret, deadline_s)
            if peer is None or peer in connections or not rank < peer < len(addresses):
                connection.close()
            else:
                connections[peer] = connection
    except OSError as error:
        for connection in connections.values():
            connection.close()
        absent = [names[peer] for peer in range(len(addresses)) if peer != rank and peer not in connections]
        who = rank_names(absent) if absent else "all others"
        raise PeerLostError(
            f"rank {names[rank]} is not connected to {who} within {timeout_s:g} s ({error}): is one gone, does a "
            "firewall stand between?",
            absent,
        ) from error
    return connections


def has_left(connection: socket.socket) -> bool:
    """Whether the next that comes is the end, or a goodbye. Does not block, and takes nothing."""
    try:
        header = _peek(connection, HEADER_BYTES)
    except OSError:  # reset: it ended with something unread
        return True
    if header is None or 0 < len(header) < HEADER_BYTES:
        return False
    return not header or unpack_goodbye(header) is not None


def _peek(connection: socket.socket, num_bytes: int = 1) -> bytes | None:
    """What comes next, at most so much of it: nothing at its end, None where it has not come."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return connection.recv(num_bytes, socket.MSG_PEEK) if poll.poll(0) else None


def introduced(connection: socket.socket, secret: str, deadline_s: float) -> int | None:
    """The rank at the other end; None for somebody who does not know the secret."""
    try:
        hello = receive_frame(connection, min(deadline_s, time.monotonic() + 5.0))
    except (OSError, ValueError):
        return None
    rank = hello.get("rank")
    is_known = secrets.compare_digest(str(hello.get("secret")).encode(), secret.encode())
    return rank if is_known and isinstance(rank, int) else None


def keep_alive(connection: socket.socket) -> None:
    """For waiting without a time limit: a host that is gone without a word is noticed within about a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
