"""What each device sends, receives, encodes and adds in an exchange: the arithmetic of ``transport``, without sending.

Bytes are exact: what ``TransportStats`` of a real run counts. An ``Exchange`` is one time that all devices send and
receive; an all-reduce in two steps is two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

HEADER_BYTES = 16
SMALL_VALUES = 8192
BLOCK_VALUES = 64
_BLOCK_BYTES = {"int8": 66, "int4": 34}


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One device's part in one exchange. Messages and bytes go out and come in, headers included; values are FP32."""

    num_sent: int = 0
    num_received: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    encoded: int = 0
    decoded: int = 0
    added: int = 0
    """Values added up, or copied together."""
    codec: str = "fp32"
    """What values are sent in."""

    @property
    def most_bytes(self) -> int:
        """Of the busier direction."""
        return max(self.sent_bytes, self.received_bytes)


Exchange = tuple[Traffic, ...]
"""By device."""


def encoded_bytes(codec: str, num_values: int) -> int:
    """Of the payload that ``num_values`` FP32 values become."""
    if codec in _BLOCK_BYTES:
        return -(-num_values // BLOCK_VALUES) * _BLOCK_BYTES[codec]
    return num_values * (2 if codec == "bf16" else 4)


def even_shares(num_values: int, num_shares: int) -> list[int]:
    """How a reduced tensor is divided: whole codec blocks, the last shares smaller or empty."""
    share = -(-num_values // (num_shares * BLOCK_VALUES)) * BLOCK_VALUES
    return [max(0, min(share, num_values - number * share)) for number in range(num_shares)]


def token_algorithm(num_values: int, num_devices: int) -> Literal["doubling", "mesh"] | None:
    """How so few values are best summed, in FP32: up to here an exchange is bound by latency, and few messages are
    faster than few bytes. None: as larger ones are."""
    if num_values > SMALL_VALUES:
        return None
    return "mesh" if num_devices & (num_devices - 1) else "doubling"


def all_gather(codec: str, values: Sequence[int]) -> list[Exchange]:
    """Device i's ``values[i]`` come to all others, at once."""
    sizes = [encoded_bytes(codec, count) for count in values]
    peers, total = len(values) - 1, sum(sizes)
    is_coded = codec != "fp32"
    return [
        tuple(
            Traffic(
                num_sent=peers,
                num_received=peers,
                sent_bytes=peers * (size + HEADER_BYTES),
                received_bytes=total - size + peers * HEADER_BYTES,
                encoded=count if is_coded else 0,
                decoded=sum(values) if is_coded else 0,
                codec=codec,
            )
            for size, count in zip(sizes, values, strict=True)
        )
    ]


def all_reduce(codec: str, num_values: int, num_devices: int, algorithm: str) -> list[Exchange]:
    """The sum of all devices' ``num_values``, at every device."""
    if algorithm == "mesh":
        return [_mesh(codec, num_values, num_devices)]
    if algorithm == "doubling":
        return _doubling(codec, num_values, num_devices)
    shares = even_shares(num_values, num_devices)
    if algorithm == "ring":
        return _ring(shares)
    return [reduce_scatter(codec, shares), *all_gather(codec, shares)]


def reduce_scatter(codec: str, shares: Sequence[int]) -> Exchange:
    """Device i gets the sum of all devices' i-th ``shares`` values."""
    sizes = [encoded_bytes(codec, count) for count in shares]
    peers, total, is_coded = len(shares) - 1, sum(sizes), codec != "fp32"
    return tuple(
        Traffic(
            num_sent=peers,
            num_received=peers,
            sent_bytes=total - size + peers * HEADER_BYTES,
            received_bytes=peers * (size + HEADER_BYTES),
            encoded=sum(shares) if is_coded else 0,
            decoded=len(shares) * count if is_coded else 0,
            codec=codec,
            added=len(shares) * count,
        )
        for size, count in zip(sizes, shares, strict=True)
    )


def all_to_all(codec: str, values: Sequence[Sequence[int]]) -> Exchange:
    """Device i's ``values[i][j]`` come to device j. Whoever has nothing for another says so."""
    sizes = [[encoded_bytes(codec, count) for count in row] for row in values]
    peers, is_coded = len(values) - 1, codec != "fp32"
    return tuple(
        Traffic(
            num_sent=peers,
            num_received=peers,
            sent_bytes=sum(row) - row[device] + peers * HEADER_BYTES,
            received_bytes=sum(column) - column[device] + peers * HEADER_BYTES,
            encoded=sum(values[device]) if is_coded else 0,
            decoded=sum(row[device] for row in values) if is_coded else 0,
            codec=codec,
            added=sum(row[device] for row in values),
        )
        for device, (row, column) in enumerate(zip(sizes, map(list, zip(*sizes, strict=True)), strict=True))
    )


def pass_on(codec: str, values: Sequence[int]) -> Exchange:
    """Device i's ``values[i]`` go to device i + 1; the last one keeps its own."""
    sizes = [encoded_bytes(codec, count) + HEADER_BYTES if count else 0 for count in values[:-1]] + [0]
    coded = [count if codec != "fp32" else 0 for count in values[:-1]] + [0]
    return tuple(
        Traffic(
            num_sent=int(size > 0),
            num_received=int(before > 0),
            sent_bytes=size,
            received_bytes=before,
            encoded=encoded,
            decoded=decoded,
            codec=codec,
        )
        for size, before, encoded, decoded in zip(sizes, [0, *sizes], coded, [0, *coded], strict=False)
    )


def broadcast(num_bytes: int, num_devices: int) -> Exchange:
    """Device 0's ``num_bytes`` come to all others."""
    message = num_bytes + HEADER_BYTES
    return tuple(
        Traffic(num_sent=num_devices - 1, sent_bytes=(num_devices - 1) * message)
        if device == 0
        else Traffic(num_received=1, received_bytes=message)
        for device in range(num_devices)
    )


def gather(values: Sequence[int]) -> Exchange:
    """All others' ``values[i]`` come to device 0, in FP32."""
    messages = [4 * count + HEADER_BYTES for count in values]
    leader = Traffic(num_received=len(values) - 1, received_bytes=sum(messages[1:]), added=sum(values))
    return (leader, *(Traffic(num_sent=1, sent_bytes=message) for message in messages[1:]))


def _mesh(codec: str, num_values: int, num_devices: int) -> Exchange:
    message, peers = encoded_bytes(codec, num_values) + HEADER_BYTES, num_devices - 1
    is_coded = codec != "fp32"
    one = Traffic(
        num_sent=peers,
        num_received=peers,
        sent_bytes=peers * message,
        received_bytes=peers * message,
        encoded=num_values if is_coded else 0,
        decoded=num_devices * num_values if is_coded else 0,
        codec=codec,
        added=num_devices * num_values,
    )
    return (one,) * num_devices


def _doubling(codec: str, num_values: int, num_devices: int) -> list[Exchange]:
    message, is_coded = encoded_bytes(codec, num_values) + HEADER_BYTES, codec != "fp32"
    one = Traffic(
        num_sent=1,
        num_received=1,
        sent_bytes=message,
        received_bytes=message,
        encoded=num_values if is_coded else 0,
        decoded=2 * num_values if is_coded else 0,
        codec=codec,
        added=num_values,
    )
    return [(one,) * num_devices] * (num_devices.bit_length() - 1)


def _ring(shares: Sequence[int]) -> list[Exchange]:
    """FP32 only. In reduce step s device i sends part i − 1 − s, in gather step s part i − s."""
    size = len(shares)
    exchanges: list[Exchange] = []
    for first, is_sum in ((1, True), (0, False)):
        for step in range(size - 1):
            sent = [shares[(device - first - step) % size] for device in range(size)]
            exchanges.append(
                tuple(
                    Traffic(
                        num_sent=1,
                        num_received=1,
                        sent_bytes=4 * sent[device] + HEADER_BYTES,
                        received_bytes=4 * sent[device - 1] + HEADER_BYTES,
                        added=sent[device - 1] if is_sum else 0,
                    )
                    for device in range(size)
                )
            )
    return exchanges
