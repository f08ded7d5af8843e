"""One rank's end of a group: moves messages, counts them, and remembers that the group has failed.

What an implementation of the transport supplies is here: ``_exchange`` and ``_hang_up``. Everything else (collectives,
codecs, asynchronous calls) is written once, on top.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from isthmus.spec.errors import IsthmusError
from isthmus.transport.buffers import Scratch
from isthmus.transport.codec import Codec, create_codec
from isthmus.transport.errors import PeerLostError, TransportError
from isthmus.transport.messages import HEADER_BYTES, Operation, pack_prefix

MAX_WORLD_SIZE = 64

Parts = Sequence[tuple[int, memoryview]]
"""(rank, payload) of messages, at most one per rank."""


@dataclass(frozen=True, kw_only=True)
class TransportStats:
    """What a group has moved so far. Bytes are payload and headers, without what TCP/IP adds."""

    num_exchanges: int
    """Times that this rank sent and received. A one-shot collective is one exchange, a ring many."""
    bytes_sent: int
    bytes_received: int
    waited_s: float
    """Seconds inside exchanges: sending, receiving and waiting for peers. Encoding and adding are not in it."""

    @staticmethod
    def total(several: Iterable[TransportStats]) -> TransportStats:
        """Of several groups together."""
        parts = list(several)
        return TransportStats(
            num_exchanges=sum(part.num_exchanges for part in parts),
            bytes_sent=sum(part.bytes_sent for part in parts),
            bytes_received=sum(part.bytes_received for part in parts),
            waited_s=sum(part.waited_s for part in parts),
        )


class Endpoint(ABC):
    """One rank of a group. Not for several threads at once."""

    def __init__(self, *, rank: int, world_size: int, timeout_s: float, global_ranks: tuple[int, ...]) -> None:
        if not 0 <= rank < world_size <= MAX_WORLD_SIZE:
            raise IsthmusError(
                f"rank, world_size: got {rank}, {world_size}, wanted 0 <= rank < world_size <= {MAX_WORLD_SIZE}"
            )
        if not timeout_s > 0:
            raise IsthmusError(f"timeout_s: got {timeout_s}, wanted seconds above 0")
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        """Seconds that a call waits for a peer from which nothing comes."""
        self.global_ranks = global_ranks
        """The numbers of this group's ranks in the group that was connected first; errors use them."""
        self.peers = tuple((rank + step) % world_size for step in range(1, world_size))
        """The others, the next one first: sending in this order, no two ranks begin with the same one, which would get
        all at once and the rest nothing."""
        self.scratch = Scratch()
        self._codecs: dict[str, Codec] = {}
        self._failure: BaseException | None = None
        self._num_calls = self._num_exchanges = self._bytes_sent = self._bytes_received = 0
        self._waited_s = 0.0
        self._arrivals: dict[int, tuple[int, float]] = {}

    @property
    def stats(self) -> TransportStats:
        return TransportStats(
            num_exchanges=self._num_exchanges,
            bytes_sent=self._bytes_sent,
            bytes_received=self._bytes_received,
            waited_s=self._waited_s,
        )

    def note_arrival(self, peer: int, num_bytes: int, seconds: float) -> None:
        """So much has come from ``peer`` while this rank did nothing but wait for it."""
        before_bytes, before_s = self._arrivals.get(peer, (0, 0.0))
        self._arrivals[peer] = before_bytes + num_bytes, before_s + seconds

    def take_arrival_rates(self) -> dict[int, float]:
        """Bytes a second from each peer, in the large messages since this was asked last; peers from which none came,
        or which this transport does not watch, are left out."""
        arrivals, self._arrivals = self._arrivals, {}
        return {peer: num_bytes / seconds for peer, (num_bytes, seconds) in arrivals.items() if seconds > 0}

    def codec(self, name: str) -> Codec:
        """This group's codec ``name``. Raises ``IsthmusError`` for an unknown one."""
        if name not in self._codecs:
            self._codecs[name] = create_codec(name)
        return self._codecs[name]

    def begin_call(self, operation: Operation, format_: int, tag: int) -> bytes:
        """The header's prefix for the messages of one call. What only some ranks take part in is not counted."""
        if operation in (Operation.SEND, Operation.SUBGROUP):
            return pack_prefix(operation, format_, tag, 0)
        self._num_calls += 1
        return pack_prefix(operation, format_, tag, self._num_calls)

    def transfer(self, prefix: bytes, outgoing: Parts, incoming: Parts) -> None:
        """Sends ``outgoing`` and fills ``incoming``, all at once. Blocks until everything is handed to the network
        and has come. After an error the group is of no more use, and every peer learns so."""
        start_s = self.begin_exchange()
        try:
            self._exchange(prefix, outgoing, incoming)
        except BaseException as error:
            self.fail(error)
            raise
        sent = sum(len(payload) for _, payload in outgoing) + HEADER_BYTES * len(outgoing)
        received = sum(len(payload) for _, payload in incoming) + HEADER_BYTES * len(incoming)
        self.end_exchange(start_s, 1, sent, received)

    def begin_exchange(self) -> float:
        """The time. Raises ``TransportError`` where the group has failed before."""
        if self._failure is not None:
            raise TransportError(f"the group has failed before ({self._failure}): close it") from self._failure
        return time.perf_counter()

    def end_exchange(self, start_s: float, num_exchanges: int, bytes_sent: int, bytes_received: int) -> None:
        """Counts what has been moved."""
        self._waited_s += time.perf_counter() - start_s
        self._num_exchanges += num_exchanges
        self._bytes_sent += bytes_sent
        self._bytes_received += bytes_received

    def fail(self, error: BaseException) -> None:
        """The group is of no more use (also after an interrupt: half a message may be on its way)."""
        self._failure = error
        self._hang_up(error.ranks if isinstance(error, PeerLostError) else ())

    @abstractmethod
    def _exchange(self, prefix: bytes, outgoing: Parts, incoming: Parts) -> None:
        """Sends to each rank of ``outgoing`` one message, and receives one from each rank of ``incoming`` whose header
        must be ``complete_header(prefix, len(payload))``. However large, whatever the others' order, it must not
        deadlock. Raises ``PeerLostError`` and ``MismatchError``."""

    @abstractmethod
    def _hang_up(self, lost_ranks: tuple[int, ...]) -> None:
        """Tells the peers, as far as possible without blocking, that this rank leaves and whom it lost (numbers of the
        first group), and closes the connections. Whoever is blocked in ``_exchange`` on another thread gets an error.
        Idempotent."""
