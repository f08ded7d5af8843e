"""Measures the links of a group with the group itself: what an exchange adds to computing, and at what rate bytes go.

Every rank calls these functions at the same time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from isthmus.profiling.steady import steady_s
from isthmus.spec.cluster import LinkProfile
from isthmus.transport.base import Group

_ROUND_TRIPS = 30
_ROUNDS = 24
_COMPUTING_S = 0.008
_SMALL_BYTES = 48 << 10
_PAUSE_S = 0.06
_AFTER_PAUSE_BYTES = 256 << 10
_SENDING_S = 0.12
_MOST_BYTES = 64 << 20


def share_texts(group: Group, text: str) -> list[str]:
    """Every rank's ``text``, in the order of ranks."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(group.world_size)]
    group.all_gather(lengths, torch.tensor([len(data)]))
    texts = [torch.empty(int(length), dtype=torch.uint8) for length in lengths]
    group.all_gather(texts, data)
    return [bytes(part.numpy()).decode() for part in texts]


def measure_link(group: Group, compute: Callable[[], object]) -> LinkProfile:
    """This rank's link. ``compute`` is some milliseconds of what the device computes between exchanges. Blocks for two
    or three seconds."""
    peers = group.world_size - 1
    round_trip_s = _round_trip_s(group)
    bytes_per_s = _rate(group)
    pair_s = _pair_s(group)
    all_s = _idle_exchange_s(group)
    message_s = max(0.0, all_s - pair_s) / max(1, peers - 1)

    repeats = max(1, round(_COMPUTING_S / steady_s(compute)))

    def segment() -> None:
        for _ in range(repeats):
            compute()

    start(group)
    own_s = torch.tensor([steady_s(segment, least_s=_ROUNDS * _COMPUTING_S)])
    segments = [torch.zeros(1) for _ in range(group.world_size)]
    group.all_gather(segments, own_s)
    segment_s = max(float(each) for each in segments)
    tiny_s = max(0.0, _with_computing_s(group, segment, 1) - segment_s)
    # No more than the link's bucket gets back while computing: what is measured here is the processor's part.
    small_bytes = int(min(_SMALL_BYTES, bytes_per_s * _COMPUTING_S / 2))
    small_s = max(0.0, _with_computing_s(group, segment, small_bytes) - segment_s)
    return LinkProfile(
        round_trip_s=round_trip_s,
        latency_s=max(round_trip_s / 2, tiny_s - peers * message_s),
        message_s=message_s,
        s_per_byte=max(0.0, small_s - tiny_s) / small_bytes,
        bytes_per_s=bytes_per_s,
        burst_bytes=_burst_bytes(group, bytes_per_s, all_s),
    )


def start(group: Group) -> None:
    """Returns on all ranks at nearly the same time."""
    group.all_reduce(torch.zeros(1))


def _exchange(group: Group, num_bytes: int) -> Callable[[], None]:
    """An exchange in which every rank sends so many bytes in all."""
    values = torch.zeros(max(1, num_bytes // 4 // (group.world_size - 1)))
    outputs = [torch.empty_like(values) for _ in range(group.world_size)]
    return lambda: group.all_gather(outputs, values)


def _timed(task: Callable[[], object], count: int) -> float:
    """Mean seconds of so many runs, the same number on all ranks."""
    task()
    start_s = time.perf_counter()
    for _ in range(count):
        task()
    return (time.perf_counter() - start_s) / count


def _idle_exchange_s(group: Group) -> float:
    return _timed(_exchange(group, 4), _ROUND_TRIPS)


def _pair_s(group: Group) -> float:
    """An exchange of little between two: this rank and a neighbour. The last of an odd number waits for the others."""
    if group.world_size == 2:
        return _idle_exchange_s(group)
    first = group.rank - group.rank % 2
    seconds = torch.zeros(1)
    if first + 1 < group.world_size:
        with group.subgroup((first, first + 1)) as pair:
            seconds[0] = _idle_exchange_s(pair)
    found = [torch.zeros(1) for _ in range(group.world_size)]
    group.all_gather(found, seconds)
    return max(float(each) for each in found)


def _with_computing_s(group: Group, segment: Callable[[], None], num_bytes: int) -> float:
    exchange = _exchange(group, num_bytes)

    def both() -> None:
        segment()
        exchange()

    start(group)
    return _timed(both, _ROUNDS)


def _round_trip_s(group: Group) -> float:
    """Median of the smallest message to rank 0 and back; of rank 0 the median to its peers."""
    message, seconds = torch.zeros(1), []
    for peer in range(1, group.world_size):
        start(group)
        if group.rank not in (0, peer):
            continue
        for _ in range(_ROUND_TRIPS):
            start_s = time.perf_counter()
            if group.rank == 0:
                group.send(message, peer)
                group.recv(message, peer)
            else:
                group.recv(message, 0)
                group.send(message, 0)
            seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds)


def _rate(group: Group) -> float:
    """Bytes a second that this rank sends while it receives as many, for long."""
    together = _sustained(group, lambda num_bytes: _exchange(group, num_bytes))
    alone = torch.tensor(
        [
            _sustained(group, lambda num_bytes, root=root: _sending(group, root, num_bytes))
            for root in range(group.world_size)
        ]
    )
    # All together go at the pace of the slowest; who is faster alone has a faster link.
    slowest = float(alone.min())
    factor = float(alone[group.rank]) / slowest
    return together * (factor if factor > 1.1 else 1.0)


def _sending(group: Group, root: int, num_bytes: int) -> Callable[[], None]:
    """``root`` sends so many bytes in all, and knows that they have come."""
    values = torch.zeros(max(1, num_bytes // 4 // (group.world_size - 1)))

    def send() -> None:
        group.broadcast(values, root=root)
        start(group)

    return send


def _sustained(group: Group, make: Callable[[int], Callable[[], None]]) -> float:
    """Bytes a second by the difference of two sizes, of which the larger takes long; all ranks see the same."""
    num_bytes, before_s = _AFTER_PAUSE_BYTES, 0.0
    while True:
        seconds = torch.tensor([_timed(make(num_bytes), 2)])
        group.broadcast(seconds)
        if float(seconds) > _SENDING_S or num_bytes >= _MOST_BYTES:
            break
        num_bytes, before_s = num_bytes * 2, float(seconds)
    if before_s == 0 or float(seconds) <= before_s:
        return num_bytes / float(seconds)
    return num_bytes / 2 / (float(seconds) - before_s)


def _burst_bytes(group: Group, bytes_per_s: float, all_s: float) -> float:
    """What goes at once after a pause: what is sent faster than ``bytes_per_s``."""
    exchange, total_s = _exchange(group, _AFTER_PAUSE_BYTES), 0.0
    rounds = 4
    for _ in range(rounds):
        time.sleep(_PAUSE_S)
        start(group)
        start_s = time.perf_counter()
        exchange()
        total_s += time.perf_counter() - start_s
    at_rate = (total_s / rounds - all_s) * bytes_per_s
    return min(_AFTER_PAUSE_BYTES / 2, max(0.0, _AFTER_PAUSE_BYTES - at_rate))
