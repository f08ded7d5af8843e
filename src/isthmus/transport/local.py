"""A group whose ranks are threads of one process: for tests of what uses a transport."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

from isthmus.transport.base import Group
from isthmus.transport.endpoint import Parts
from isthmus.transport.errors import MismatchError, PeerLostError
from isthmus.transport.messages import HEADER_BYTES, complete_header, describe, pack_goodbye, unpack_goodbye


class _Network:
    """The queues between all ranks of a group, and the groups that its ranks make of it."""

    def __init__(self, world_size: int) -> None:
        ranks = range(world_size)
        self.queues = {(source, to): queue.SimpleQueue[bytes]() for source in ranks for to in ranks}
        self._lock = threading.Lock()
        self._subnetworks: dict[tuple[tuple[int, ...], int], _Network] = {}

    def subnetwork(self, members: tuple[int, ...], number: int) -> _Network:
        """The ``number``-th one of ``members``: the first to ask makes it."""
        with self._lock:
            return self._subnetworks.setdefault((members, number), _Network(len(members)))


class LocalGroup(Group):
    """One thread's end. Made by ``create_local_groups``, for all ranks at once."""

    def __init__(self, network: _Network, *, rank: int, timeout_s: float, global_ranks: tuple[int, ...]) -> None:
        super().__init__(rank=rank, world_size=len(global_ranks), timeout_s=timeout_s, global_ranks=global_ranks)
        self._network = network
        self._num_subgroups: dict[tuple[int, ...], int] = {}

    def subgroup(self, ranks: Sequence[int]) -> LocalGroup:
        members = self._check_members(ranks)
        number = self._num_subgroups[members] = self._num_subgroups.get(members, 0) + 1
        return LocalGroup(
            self._network.subnetwork(members, number),
            rank=members.index(self.rank),
            timeout_s=self.timeout_s,
            global_ranks=tuple(self.global_ranks[member] for member in members),
        )

    def _exchange(self, prefix: bytes, outgoing: Parts, incoming: Parts) -> None:
        for peer, payload in outgoing:
            self._network.queues[self.rank, peer].put(complete_header(prefix, len(payload)) + bytes(payload))
        for peer, payload in incoming:
            try:
                message = self._network.queues[peer, self.rank].get(timeout=self.timeout_s)
            except queue.Empty:
                rank = self.global_ranks[peer]
                raise PeerLostError(f"rank {rank} lost: nothing for {self.timeout_s:g} s", [rank]) from None
            header, wanted = message[:HEADER_BYTES], complete_header(prefix, len(payload))
            if header != wanted:
                raise self._unexpected(peer, header, wanted)
            payload[:] = message[HEADER_BYTES:]

    def _unexpected(self, peer: int, header: bytes, wanted: bytes) -> PeerLostError | MismatchError:
        lost = unpack_goodbye(header)
        if lost is None:
            return MismatchError(f"rank {self.global_ranks[peer]} sent {describe(header)}, wanted {describe(wanted)}")
        lost = lost or (self.global_ranks[peer],)
        return PeerLostError(f"rank {', '.join(map(str, lost))} is lost: it has left the group", lost)

    def _hang_up(self, lost_ranks: tuple[int, ...]) -> None:
        for peer in self.peers:
            self._network.queues[self.rank, peer].put(pack_goodbye(lost_ranks))
            # And this rank's own thread, if it is waiting for the peer.
            self._network.queues[peer, self.rank].put(pack_goodbye((self.global_ranks[self.rank],)))


def create_local_groups(world_size: int, *, timeout_s: float = 60.0) -> list[LocalGroup]:
    """The ends of one group, rank by rank, each for a thread of its own."""
    network = _Network(world_size)
    ranks = tuple(range(world_size))
    return [LocalGroup(network, rank=rank, timeout_s=timeout_s, global_ranks=ranks) for rank in ranks]
