"""Messages from GPU to GPU by NCCL: one channel for each direction between two ranks.

NCCL knows no tags: what one rank sends another is taken in the order in which both ask for it, and a send keeps its
stream until its receive is asked for. So a channel is a communicator on which one rank only sends and the other only
receives, and a *notice* goes ahead of every message, over gloo: its tag and its length. A thread of the receiver reads
a channel's notices and asks for each message at once, whatever the rest of its process is doing or waiting for; there
the message is found by its tag. So no send waits for more than the transfers before it in its channel.

CUDA runs streams independently only while each has a connection of its own (``MAX_CONNECTIONS``), and NCCL refuses two
ranks on one GPU.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from threading import Condition, Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_CONNECTIONS = 32
"""``CUDA_DEVICE_MAX_CONNECTIONS``, to be set before CUDA begins: 8 are the default, and streams that share one wait for
each other."""
_END = -1
"""The length in a channel's last notice."""
_POLL_S = 50e-6
_FOR_EVER = timedelta(days=365)
"""A channel may be silent for as long as its run lasts; that its sender has ended is noticed at once."""


def pairs(num_ranks: int) -> list[tuple[int, int]]:
    """(source, target) of all channels: neighbours in the ring, and rank 0 with all, both ways."""
    linked = {frozenset((rank, (rank + 1) % num_ranks)) for rank in range(num_ranks)}
    linked |= {frozenset((0, rank)) for rank in range(1, num_ranks)}
    ordered = sorted(tuple(sorted(pair)) for pair in linked if len(pair) == 2)
    return [both for low, high in ordered for both in ((low, high), (high, low))]


class Inbox:
    """The receiving end of a channel."""

    def __init__(self, source: int, channel: Any, notices: Any, device: torch.device, timeout_s: float) -> None:
        self._source, self._channel, self._notices, self._device = source, channel, notices, device
        self._timeout_s = timeout_s
        self._news = Condition()
        self._messages: defaultdict[int, deque[tuple[Tensor, Any]]] = defaultdict(deque)
        """Asked for, by tag, and what tells that they are here."""
        self._error: RuntimeError | None = None
        self._thread = Thread(target=self._follow, name=f"from rank {source}", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        """Asks for every message that is announced."""
        notice = torch.empty(2, dtype=torch.int64)
        try:
            with _own_stream(self._device):
                while True:
                    dist.recv(notice, self._source, group=self._notices)
                    tag, num_bytes = notice.tolist()
                    if num_bytes == _END:
                        return
                    message = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
                    work = dist.irecv(message, self._source, group=self._channel)
                    with self._news:
                        self._messages[tag].append((message, work))
                        self._news.notify_all()
        except RuntimeError as error:
            with self._news:
                self._error = error
                self._news.notify_all()

    def has(self, tag: int) -> bool:
        with self._news:
            messages = self._messages[tag]
            return bool(messages) and (self._device.type != "cuda" or messages[0][1].is_completed())

    def take(self, tag: int) -> Tensor:
        """The next message with this tag. Blocks until it is here."""
        with self._news:
            self._news.wait_for(lambda: self._messages[tag] or self._error, timeout=self._timeout_s)
            if not self._messages[tag]:
                raise self._error or RuntimeError("timed out")
            message, work = self._messages[tag].popleft()
        self.settle(work)
        if message.is_cuda:
            message.record_stream(torch.cuda.current_stream(self._device))
        return message

    def settle(self, work: Any) -> None:
        """Blocks until ``work``, with this inbox's rank, is over. NCCL would wait for one that has ended."""
        ends_s = time.monotonic() + self._timeout_s
        while self._device.type == "cuda" and not work.is_completed():
            if self._error is not None:
                raise self._error
            if time.monotonic() > ends_s:
                raise RuntimeError("timed out")
            time.sleep(_POLL_S)
        work.wait()

    def join(self) -> None:
        self._thread.join()


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Nothing that this thread asks for waits for what others compute."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


class Channels:
    """See ``Carrier``. All ranks make it at the same time; the default process group must be gloo's."""

    def __init__(self, device: torch.device, timeout_s: float, backend: str = "nccl") -> None:
        """``device``: this rank's own GPU. ``backend``: of the channels; gloo's are for CPUs.

        Blocks until all are connected. Raises ``RuntimeError`` where that fails.
        """
        self.device = device
        rank, limit = dist.get_rank(), timedelta(seconds=timeout_s)
        # Nothing of a notice may wait for other messages' time limits.
        self._notices: Any = dist.new_group(backend="gloo", timeout=_FOR_EVER)
        channels: dict[tuple[int, int], Any] = {}
        for pair in pairs(dist.get_world_size()):
            # Which all ranks must make, in the same order.
            channels[pair] = dist.new_group([*pair], backend=backend, timeout=limit)
            # NCCL connects with the first message.
            first = torch.zeros(1, dtype=torch.uint8, device=device)
            if rank == pair[0]:
                dist.send(first, pair[1], group=channels[pair])
            elif rank == pair[1]:
                dist.recv(first, pair[0], group=channels[pair])
        self._outgoing = {target: channel for (source, target), channel in channels.items() if source == rank}
        self._inboxes = {
            source: Inbox(source, channel, self._notices, device, timeout_s)
            for (source, target), channel in channels.items()
            if target == rank
        }

    def send(self, message: Tensor, to: int, tag: int) -> Callable[[], object]:
        flat = message.reshape(-1).view(torch.uint8)
        notice = torch.tensor([tag, flat.numel()])
        noticed = dist.isend(notice, to, group=self._notices)
        work = dist.isend(flat, to, group=self._outgoing[to])

        def settle() -> None:
            assert noticed is not None
            noticed.wait()
            self._inboxes[to].settle(work)

        return settle

    def receive(self, num_bytes: int, source: int, tag: int) -> ChannelMessage:
        return ChannelMessage(self._inboxes[source], num_bytes, tag)

    def close(self) -> None:
        for other in self._outgoing:
            dist.send(torch.tensor([0, _END]), other, group=self._notices)
        for inbox in self._inboxes.values():
            inbox.join()


class ChannelMessage:
    """One that is awaited; its memory is taken when it is announced."""

    def __init__(self, inbox: Inbox, num_bytes: int, tag: int) -> None:
        self._inbox, self._num_bytes, self._tag = inbox, num_bytes, tag
        self._message: Tensor | None = None

    def is_here(self) -> bool:
        return self._message is not None or self._inbox.has(self._tag)

    def wait(self) -> Tensor:
        if self._message is None:
            message = self._inbox.take(self._tag)
            if message.numel() != self._num_bytes:
                raise RuntimeError(f"got {message.numel()} bytes, wanted {self._num_bytes}")
            self._message = message
        return self._message
