"""How the devices of a request come together.

Three ways: the processes were started one per device, by torchrun or a testbed (RANK and WORLD_SIZE are set); or a
leader invites workers (``isthmus worker``) by their addresses; or this device is alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from isthmus.inference.planned import Wish
from isthmus.spec.errors import IsthmusError
from isthmus.spec.serialization import from_json, to_json
from isthmus.transport.base import Group
from isthmus.transport.rendezvous import listen, receive_frame, send_frame
from isthmus.transport.sockets import SocketGroup

WORKER_PORT = 29400
TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """What a leader tells a worker: which model, what is wanted of it, and where to meet."""

    schema_version: int = 1
    model: str
    digest: str
    wish: Wish
    rank: int
    world_size: int
    address: str
    port: int
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class WorkerAddress:
    """Where a worker listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def is_started_per_device() -> bool:
    """Whether torchrun's variables say that this process is one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def parse_devices(text: str) -> list[WorkerAddress]:
    """The workers in ``HOST[:PORT],…``. An address of this machine without a port stands for this process, which leads
    and is not a worker. Raises ``IsthmusError`` for an address twice, or none."""
    own = {address.address for interface in psutil.net_if_addrs().values() for address in interface} | {"localhost"}
    workers: list[WorkerAddress] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        host, colon, port = item.partition(":")
        if colon and not (port.isdigit() and 0 < int(port) < 1 << 16):
            raise IsthmusError(f"devices: got port {port!r} in {item!r}, wanted 1 … 65535, as in 192.168.1.10:29400")
        if not colon and host in own:
            continue
        worker = WorkerAddress(host=host, port=int(port) if colon else WORKER_PORT)
        if worker in workers:
            raise IsthmusError(f"devices: {worker} is there twice, wanted each device once")
        workers.append(worker)
    if not text.strip(" ,"):
        raise IsthmusError("devices: got none, wanted addresses such as 192.168.1.10,192.168.1.11")
    return workers


def invite(
    workers: Sequence[WorkerAddress], *, model: str, digest: str, wish: Wish, timeout_s: float = TIMEOUT_S
) -> Group:
    """Asks each of ``workers`` to take part and meets them; this process is rank 0. Blocks.

    Raises ``IsthmusError`` naming the worker that does not answer, or that refuses, and why.
    """
    deadline_s = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(_connect(worker, deadline_s)) for worker in workers]
        # Where the first worker reaches this machine, the others do too.
        own_address = connections[0].getsockname()[0]
        listener = stack.enter_context(listen(own_address))
        port = listener.getsockname()[1]
        for rank, (worker, connection) in enumerate(zip(workers, connections, strict=True), start=1):
            invitation = Invitation(
                model=model,
                digest=digest,
                wish=wish,
                rank=rank,
                world_size=len(workers) + 1,
                address=own_address,
                port=port,
                timeout_s=timeout_s,
            )
            _ask(worker, connection, invitation, deadline_s)
        return SocketGroup.connect(
            rank=0,
            world_size=len(workers) + 1,
            address=own_address,
            port=port,
            digest=digest,
            timeout_s=timeout_s,
            listener=listener,
        )


def accept(invitation: Invitation) -> Group:
    """A worker's way to the meeting. Blocks."""
    return SocketGroup.connect(
        rank=invitation.rank,
        world_size=invitation.world_size,
        address=invitation.address,
        port=invitation.port,
        digest=invitation.digest,
        timeout_s=invitation.timeout_s,
    )


def _connect(worker: WorkerAddress, deadline_s: float) -> socket.socket:
    try:
        return socket.create_connection((worker.host, worker.port), timeout=max(0.1, deadline_s - time.monotonic()))
    except OSError as error:
        raise IsthmusError(
            f"devices: {worker} does not answer ({error}): run `isthmus worker --listen {worker.host} "
            f"--port {worker.port}` there, and check the network"
        ) from error


def _ask(worker: WorkerAddress, connection: socket.socket, invitation: Invitation, deadline_s: float) -> None:
    try:
        send_frame(connection, {"invitation": to_json(invitation)})
        answer = receive_frame(connection, deadline_s)
    except (OSError, ValueError) as error:
        raise IsthmusError(
            f"devices: {worker} hung up ({error}); look at what `isthmus worker` prints there"
        ) from error
    if "error" in answer:
        raise IsthmusError(f"devices: {worker} cannot take part: {answer['error']}")


def read_invitation(content: dict) -> Invitation:
    """Raises ``ValueError`` where ``content`` is none."""
    return from_json(Invitation, str(content.get("invitation")))
