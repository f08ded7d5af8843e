"""Measures the links of a group with the group itself: what an exchange adds to computing, and at what rate bytes go.

Every rank calls these functions at the same time.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from isthmus.profiling.steady import mean_s, steady_s
from isthmus.spec.cluster import LinkProfile, Overlapping, Transfer, Waiting
from isthmus.transport.base import Group

_ROUND_TRIPS = 30
_ROUNDS = 24
_SUMS = 256
_COMPUTING_S = (0.0005, 0.012)
_SIZES = tuple(1 << power for power in range(14, 23))
_LONGEST_S = 0.12
"""Larger exchanges are not tried: beyond, seconds are in proportion to bytes."""
_BEYOND_BURST_BYTES = 1 << 17
_PAUSE_S = 0.03
_REPEATS = 5
_OVERLAPS = 3
_SAME = 0.85
_CHECK_S = 0.01
_SIMILAR = 1.4


def share_texts(group: Group, text: str) -> list[str]:
    """Every rank's ``text``, in the order of ranks."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(group.world_size)]
    group.all_gather(lengths, torch.tensor([len(data)]))
    texts = [torch.empty(int(length), dtype=torch.uint8) for length in lengths]
    group.all_gather(texts, data)
    return [bytes(part.numpy()).decode() for part in texts]


def measure_link(
    group: Group, computes: Sequence[Callable[[], object]], *, num_summed: int = 0, may_overlap: bool = False
) -> LinkProfile:
    """This rank's link. ``computes``: little and much of what the device computes between exchanges, such as one layer
    of a token and of a text. ``num_summed``: the values of a repeated sum after the little. ``may_overlap``: whether
    exchanges may go on while devices compute. Blocks for two to five seconds."""
    peers = group.world_size - 1
    round_trip_s = _round_trip_s(group)
    idle_s = _idle_exchange_s(group)
    message_s = max(0.0, idle_s - _pair_s(group)) / max(1, peers - 1)
    transfer = _of_own_link(group, _transfer(group, _mean(group, idle_s)))
    bytes_per_s, burst_bytes = _rate(transfer)
    return LinkProfile(
        round_trip_s=round_trip_s,
        latency_s=max(round_trip_s / 2, idle_s - peers * message_s),
        message_s=message_s,
        waiting=_waiting(group, computes, idle_s),
        sum_step_s=_sum_step_s(group, computes[0], num_summed) if num_summed else 0.0,
        transfer=transfer,
        bytes_per_s=bytes_per_s,
        burst_bytes=burst_bytes,
        overlapping=_overlapping(group, computes[-1], transfer) if may_overlap else None,
    )


def is_as_measured(group: Group, link: LinkProfile) -> bool:
    """Whether an exchange of some milliseconds still takes what ``link`` says: the same answer on all ranks, in a few
    tenths of a second."""
    seconds = link.transfer.seconds
    index = next((number for number, value in enumerate(seconds) if value >= _CHECK_S), len(seconds) - 1)
    num_bytes = link.transfer.num_bytes[index]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.world_size)]
    group.all_gather(sizes, torch.tensor([num_bytes]))
    smallest = min(int(size) for size in sizes)  # ranks may have profiles of different links
    index = max((i for i, size in enumerate(link.transfer.num_bytes) if size <= smallest), default=0)
    found_s = _after_pause_s(group, _exchange(group, smallest), 3)
    expected_s = _mean(group, seconds[index] + link.latency_s + (group.world_size - 1) * link.message_s)
    return max(found_s, expected_s) < _SIMILAR * min(found_s, expected_s)


def _rate(transfer: Transfer) -> tuple[float, float]:
    """Bytes a second, and the least burst with which none of the smaller exchanges was faster than that.

    The upper quartile of the rates between any two sizes that are more than a burst: where a queue overflowed or a
    processor is too slow for its link, some are far below the link's. Of the larger exchanges such a thing would pass
    for a burst.
    """
    points = list(zip(transfer.num_bytes, transfer.seconds, strict=True))
    beyond = [point for point in points if point[0] >= _BEYOND_BURST_BYTES]
    pairs = list(itertools.combinations(beyond if len(beyond) > 1 else points[-2:], 2))
    s_per_byte = [(more_s - less_s) / (more - less) for (less, less_s), (more, more_s) in pairs]
    bytes_per_s = 1 / max(float(np.quantile(s_per_byte, 0.25)), 1e-12)
    smaller = [point for point in points if point[0] <= 2 * _BEYOND_BURST_BYTES]
    return bytes_per_s, max(0.0, *(num_bytes - seconds * bytes_per_s for num_bytes, seconds in smaller))


def _waiting(group: Group, computes: Sequence[Callable[[], object]], idle_s: float) -> Waiting:
    """What an exchange of next to nothing adds to some computing, beside what it takes by itself."""
    points: dict[float, float] = {}
    for compute, least_s in zip(computes, _COMPUTING_S, strict=True):
        repeats = max(1, round(least_s / steady_s(compute)))

        def segment(compute: Callable[[], object] = compute, count: int = repeats) -> None:
            for _ in range(count):
                compute()

        start(group)
        own_s = _most(group, mean_s(segment, _ROUNDS * least_s))
        exchange = _exchange(group, 4)

        def both(segment: Callable[[], None] = segment, exchange: Callable[[], None] = exchange) -> None:
            segment()
            exchange()

        start(group)
        points[own_s] = max(0.0, _mean(group, _timed(both, _ROUNDS)) - own_s - idle_s)
    computing_s = tuple(sorted(points))
    return Waiting(computing_s=computing_s, seconds=tuple(points[second] for second in computing_s))


def _sum_step_s(group: Group, compute: Callable[[], object], num_values: int) -> float:
    """What a repeated sum adds to some computing, by the exchanges that it consists of."""
    add_up = group.repeated_sum(num_values)
    before = group.stats.num_exchanges
    add_up()
    num_exchanges = group.stats.num_exchanges - before
    start(group)
    own_s = _most(group, steady_s(compute))

    def both() -> None:
        compute()
        add_up()

    start(group)
    return max(0.0, _mean(group, _timed(both, _SUMS)) - own_s) / num_exchanges


def _overlapping(group: Group, compute: Callable[[], object], transfer: Transfer) -> Overlapping:
    """Of this device. Computing lasts longer than the exchange that goes on meanwhile, whose cost is so all in it.

    Sending is the same work for every processor, so it is taken to cost each as much of its own computing: the mean
    over devices. A difference of two windows is off by a third on a busy machine, and the slowest device is waited for.
    """
    smallest = _exchange(group, 4)
    more_s = [
        _timed(lambda: group.start(smallest).wait(), _ROUNDS) - _timed(smallest, _ROUNDS) for _ in range(_OVERLAPS)
    ]
    starting_s = _mean(group, max(0.0, statistics.median(more_s)))
    num_bytes, lasting_s = transfer.num_bytes[-1], 1.5 * transfer.seconds[-1] + _PAUSE_S
    exchange = _exchange(group, num_bytes)
    exchange()
    found, alone_s = [], []
    for _ in range(_OVERLAPS):
        start(group)
        own_s = mean_s(compute, lasting_s)
        alone_s.append(own_s)
        start(group)
        handle, count, start_s = group.start(exchange), 0, time.perf_counter()
        while not handle.is_done() or time.perf_counter() - start_s < lasting_s:
            compute()
            count += 1
        found.append(time.perf_counter() - start_s - count * own_s)
        handle.wait()
    own_s = statistics.median(alone_s)
    more = max(0.0, _mean(group, statistics.median(found) / own_s))
    return Overlapping(starting_s=starting_s, s_per_byte=more * own_s / num_bytes)


def _most(group: Group, seconds: float) -> float:
    """The most of all ranks' ``seconds``."""
    parts = [torch.zeros(1) for _ in range(group.world_size)]
    group.all_gather(parts, torch.tensor([seconds]))
    return max(float(part) for part in parts)


def _transfer(group: Group, idle_s: float) -> Transfer:
    """Seconds by bytes, the same on all ranks, up to where they are long."""
    sizes: list[int] = []
    seconds: list[float] = []
    for num_bytes in _SIZES:
        before_s = seconds[-1] if seconds else 0.0
        repeats = 2 if before_s > _LONGEST_S / 4 else _REPEATS
        found_s = _after_pause_s(group, _exchange(group, num_bytes), repeats) - idle_s
        sizes.append(num_bytes)
        seconds.append(max(found_s, before_s, 0.0))
        if seconds[-1] > _LONGEST_S:
            break
    return Transfer(num_bytes=tuple(sizes), seconds=tuple(seconds))


def _after_pause_s(group: Group, exchange: Callable[[], object], repeats: int) -> float:
    """Mean over ranks of the median: a host's other work only ever adds. The same on all."""
    found = []
    exchange()
    for _ in range(repeats):
        time.sleep(_PAUSE_S)
        start(group)
        start_s = time.perf_counter()
        exchange()
        found.append(time.perf_counter() - start_s)
    return _mean(group, statistics.median(found))


def _mean(group: Group, seconds: float) -> float:
    parts = [torch.zeros(1) for _ in range(group.world_size)]
    group.all_gather(parts, torch.tensor([seconds]))
    return sum(float(part) for part in parts) / len(parts)


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


def _of_own_link(group: Group, transfer: Transfer) -> Transfer:
    """All together go at the pace of the slowest link; a rank that sends faster alone has a faster one."""
    num_bytes = transfer.num_bytes[-2]
    alone = [_after_pause_s(group, _sending(group, root, num_bytes), 2) for root in range(group.world_size)]
    factor = alone[group.rank] / max(alone)
    if factor > _SAME:
        return transfer
    return Transfer(num_bytes=transfer.num_bytes, seconds=tuple(value * factor for value in transfer.seconds))


def _sending(group: Group, root: int, num_bytes: int) -> Callable[[], None]:
    """``root`` sends so many bytes in all, and knows that they have come."""
    values = torch.zeros(max(1, num_bytes // 4 // (group.world_size - 1)))

    def send() -> None:
        group.broadcast(values, root=root)
        start(group)

    return send
