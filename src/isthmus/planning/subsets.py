"""Which sets of devices are weighed for a request."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from isthmus.planning.device_costs import DeviceCosts
from isthmus.planning.exchanges import Traffic
from isthmus.planning.plans import Question
from isthmus.planning.steps import Work

ALL_UP_TO = 8
"""Of so many devices every subset is weighed (128 of them), but for those that have more devices than sub-blocks."""


def subsets(question: Question, costs: Mapping[int, DeviceCosts], slowdown: float = 1.0) -> Iterator[tuple[int, ...]]:
    """Ranks, ascending, the leader's always among them; small sets first, each set once. ``slowdown``: of all links.

    Of up to ``ALL_UP_TO`` devices every set, of a decoupled model's up to as many as it has sub-blocks. Of more, for
    some sizes (1 to 8, 10, 12, 14, 16, 20, …, and all), the leader with those that are first in an order: by seconds of
    computing a layer, by seconds for a layer's tokens on their link, by both together, and by memory. At most four sets
    of a size. Teams, of many devices that share sub-blocks, take long to weigh: of each twice as many devices as the
    size before, and of all, the set that is first by both.
    """
    num_devices, form = len(question.profile.devices), question.spec.decoupling
    others, all_up_to = range(1, num_devices), num_devices if num_devices <= ALL_UP_TO else 0
    if form is not None:
        all_up_to = min(all_up_to, form.num_sub_blocks)
    for size in range(all_up_to):
        for chosen in itertools.combinations(others, size):
            yield 0, *chosen
    sizes, team_sizes = [size for size in _sizes(num_devices) if size > all_up_to], []
    if form is not None and num_devices > ALL_UP_TO:
        team_sizes = _doubled(form.num_sub_blocks, num_devices)
        sizes = [size for size in sizes if size <= form.num_sub_blocks]
    if not sizes and not team_sizes:
        return
    compute_s = {rank: _layer_s(question, costs[rank]) for rank in others}
    link_s = {rank: _tokens_s(question, costs[rank], slowdown) for rank in others}
    orders = [
        sorted(others, key=compute_s.__getitem__),
        sorted(others, key=link_s.__getitem__),
        sorted(others, key=lambda rank: compute_s[rank] + link_s[rank]),
        sorted(others, key=lambda rank: -question.budget_bytes(rank)),
    ]
    for size in sizes:
        yield from dict.fromkeys((0, *sorted(order[: size - 1])) for order in orders)
    for size in team_sizes:
        yield 0, *sorted(orders[2][: size - 1])


def _sizes(num_devices: int) -> list[int]:
    sizes = {1, 2, 3, num_devices}
    sizes |= {part << power for power in range(num_devices.bit_length()) for part in (4, 5, 6, 7)}
    return sorted(size for size in sizes if size <= num_devices)


def _doubled(num_sub_blocks: int, num_devices: int) -> list[int]:
    """Twice as many devices as sub-blocks, four times as many, …, and all, where that is more than one each."""
    powers = range(1, (num_devices // num_sub_blocks).bit_length())
    sizes = {num_sub_blocks << power for power in powers} | {num_devices}
    return sorted(size for size in sizes if num_sub_blocks < size <= num_devices)


def _layer_s(question: Question, device: DeviceCosts) -> float:
    rows = question.request.batch * question.request.num_tokens
    return device.work_s(Work(attention_rows=rows, attention_share=1.0, mlp_rows=rows, mlp_share=1.0))


def _tokens_s(question: Question, device: DeviceCosts, slowdown: float) -> float:
    num_bytes = 4 * question.request.batch * question.request.num_tokens * question.spec.hidden_size
    traffic = Traffic(num_sent=1, num_received=1, sent_bytes=num_bytes, received_bytes=num_bytes)
    return device.messages_s(traffic, 0.0) + device.transfer_s(traffic) * slowdown
