"""The same group over torch.distributed's gloo: to compare with, and where gloo is what is wanted.

Only its point-to-point messages are used, so that results have the same bits as over sockets. No global process group
exists. gloo ends the process when a message is longer than the buffer for it, so each header travels ahead and is
compared first. Store and connections are bound to one address.

What gloo cannot do: a send waits for its receiver, so ranks that call different things may only notice by the time
limit; a rank that leaves cannot say whom it lost, so a rank that waited for it names it and not the first one.
"""

from __future__ import annotations

import datetime
import socket
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from isthmus.transport.base import Group
from isthmus.transport.endpoint import Parts
from isthmus.transport.errors import MismatchError, PeerLostError, RendezvousError, TransportError
from isthmus.transport.messages import HEADER_BYTES, complete_header, describe
from isthmus.transport.rendezvous import Meeting, listen, local_address, meet, read_environment

_HEADER_TAG, _PAYLOAD_TAG = 0, 1


class GlooGroup(Group):
    """A group whose messages gloo carries. Made by ``connect`` or ``from_environment``, as ``SocketGroup`` is."""

    def __init__(
        self, store: Store, *, name: str, rank: int, address: str, timeout_s: float, global_ranks: tuple[int, ...]
    ) -> None:
        super().__init__(rank=rank, world_size=len(global_ranks), timeout_s=timeout_s, global_ranks=global_ranks)
        self._store = store
        self._name = name
        self._address = address
        self._num_subgroups: dict[tuple[int, ...], int] = {}
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=address)]
        options._timeout = datetime.timedelta(seconds=timeout_s)
        options._threads = 1
        try:
            self._gloo: Any = gloo(PrefixStore(name, store), rank, self.world_size, options)
        except RuntimeError as error:
            raise RendezvousError(f"gloo could not connect {self.world_size} ranks ({error}): is one gone?") from error
        self._headers_out = [torch.empty(HEADER_BYTES, dtype=torch.uint8) for _ in range(self.world_size)]
        self._headers_in = [torch.empty(HEADER_BYTES, dtype=torch.uint8) for _ in range(self.world_size)]

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
        """Meets the other ranks as ``SocketGroup.connect`` does, then lets gloo connect them. Blocks, raises the
        same."""
        meeting = Meeting(
            rank=rank, world_size=world_size, address=address, port=port, digest=digest, timeout_s=timeout_s
        )
        own_address = local_address(meeting)
        limit = datetime.timedelta(seconds=timeout_s)
        if rank == 0:
            with listener or listen(address, port) as host, listen(address) as store_listener:
                store_port = store_listener.getsockname()[1]
                meet(meeting, {"store_port": store_port}, host)
                # Left to itself the store would listen on all interfaces.
                store_fd = store_listener.detach()
                store = TCPStore(address, store_port, None, True, limit, False, master_listen_fd=store_fd)
        else:
            store_port = int(meet(meeting, {}, None).details[0]["store_port"])
            store = TCPStore(address, store_port, None, False, limit, False)
        return cls(
            store,
            name="all",
            rank=rank,
            address=own_address,
            timeout_s=timeout_s,
            global_ranks=tuple(range(world_size)),
        )

    @classmethod
    def from_environment(cls, *, digest: str = "", timeout_s: float = 60.0) -> Self:
        """``connect`` with torchrun's variables."""
        return cls.connect(**read_environment(), digest=digest, timeout_s=timeout_s)

    @property
    def process_group(self) -> dist.ProcessGroupGloo:
        """gloo's own, with its own collectives: for measurements."""
        return self._gloo

    def subgroup(self, ranks: Sequence[int]) -> GlooGroup:
        members = self._check_members(ranks)
        number = self._num_subgroups[members] = self._num_subgroups.get(members, 0) + 1
        return GlooGroup(
            self._store,
            name=f"{self._name}/{members}#{number}",
            rank=members.index(self.rank),
            address=self._address,
            timeout_s=self.timeout_s,
            global_ranks=tuple(self.global_ranks[member] for member in members),
        )

    def _exchange(self, prefix: bytes, outgoing: Parts, incoming: Parts) -> None:
        try:
            self._carry(prefix, outgoing, incoming)
        except TransportError as error:
            # What they refer to holds the connections open, which the others wait to see closed.
            traceback.clear_frames(error.__traceback__)
            raise

    def _carry(self, prefix: bytes, outgoing: Parts, incoming: Parts) -> None:
        gloo = self._gloo
        sending: list[tuple[int, Any]] = []
        receiving: list[tuple[int, Any]] = []
        headers = [(peer, self._post(gloo.recv, self._headers_in[peer], peer, _HEADER_TAG)) for peer, _ in incoming]
        for peer, payload in outgoing:
            self._headers_out[peer].copy_(_as_tensor(memoryview(bytearray(complete_header(prefix, len(payload))))))
            sending.append((peer, self._post(gloo.send, self._headers_out[peer], peer, _HEADER_TAG)))
            if payload:
                sending.append((peer, self._post(gloo.send, _as_tensor(payload), peer, _PAYLOAD_TAG)))
        for (peer, work), (_, payload) in zip(headers, incoming, strict=True):
            self._wait(peer, work)
            got, wanted = bytes(self._headers_in[peer].tolist()), complete_header(prefix, len(payload))
            if got != wanted:
                raise MismatchError(
                    f"rank {self.global_ranks[peer]} sent {describe(got)}, rank {self.global_ranks[self.rank]} wanted "
                    f"{describe(wanted)}: all ranks must make the same calls in the same order, with the same sizes"
                )
            if payload:
                receiving.append((peer, self._post(gloo.recv, _as_tensor(payload), peer, _PAYLOAD_TAG)))
        for peer, work in receiving + sending:
            self._wait(peer, work)

    def _post(self, call: Callable[..., Any], message: Tensor, peer: int, tag: int) -> Any:
        try:
            return call([message], peer, tag)
        except RuntimeError as error:  # the connection is known to be closed
            raise self._lost(peer, error) from error

    def _wait(self, peer: int, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(peer, error) from error

    def _lost(self, peer: int, error: RuntimeError) -> PeerLostError:
        rank = self.global_ranks[peer]
        reason = f"nothing for {self.timeout_s:g} s" if "Timed out" in str(error) else "hung up"
        return PeerLostError(f"rank {rank} is lost: {reason} ({error}): see its output, then start all again", [rank])

    def _hang_up(self, lost_ranks: tuple[int, ...]) -> None:
        # The connections close with the last reference; a call that is blocked on another thread holds one until its
        # time limit.
        self._gloo = None


def _as_tensor(payload: memoryview) -> Tensor:
    return torch.frombuffer(payload, dtype=torch.uint8)
