"""The header that goes before every message: what the message is, so that calls that do not match are seen at once.

Sixteen bytes, little endian: operation, format of the values, tag (the root of a rooted call, the tag of a send),
number of the call in its group, bytes that follow. Both sides know all of it beforehand; the receiver compares.
"""

from __future__ import annotations

import enum
import struct

import torch

HEADER_BYTES = 16
_HEADER = struct.Struct("<BBHIQ")
_PREFIX = struct.Struct("<BBHI")
_COUNT = struct.Struct("<Q")

# Formats up to 15 are codecs (``Codec.wire_id``), the others dtypes.
DTYPE_FORMATS = {torch.float32: 16, torch.bfloat16: 17, torch.int64: 18, torch.int8: 19, torch.uint8: 20}
_FORMAT_NAMES = {format_: str(dtype).removeprefix("torch.") for dtype, format_ in DTYPE_FORMATS.items()}
_FORMAT_NAMES |= {1: "fp32 codec", 2: "bf16 codec", 3: "int8 codec", 4: "int4 codec"}


class Operation(enum.IntEnum):
    """What a message belongs to."""

    GOODBYE = 0
    """The sender leaves the group. The count is a bit mask of the ranks that it has lost: 0 after an orderly close."""
    BROADCAST = 1
    GATHER = 2
    ALL_GATHER = 3
    REDUCE_SCATTER = 4
    ALL_REDUCE = 5
    ALL_TO_ALL = 6
    SEND = 7
    SUBGROUP = 8


def pack_prefix(operation: Operation, format_: int, tag: int, call: int) -> bytes:
    """All of a header but the number of bytes that follow: what all messages of one call have in common."""
    return _PREFIX.pack(operation, format_, tag, call & 0xFFFFFFFF)


def complete_header(prefix: bytes, num_bytes: int) -> bytes:
    return prefix + _COUNT.pack(num_bytes)


def pack_goodbye(lost_ranks: tuple[int, ...]) -> bytes:
    return complete_header(pack_prefix(Operation.GOODBYE, 0, 0, 0), sum(1 << rank for rank in lost_ranks))


def unpack_goodbye(header: bytes) -> tuple[int, ...] | None:
    """The ranks that the sender of a goodbye had lost; None for any other message."""
    operation, *_, mask = _HEADER.unpack(header)
    if operation != Operation.GOODBYE:
        return None
    return tuple(rank for rank in range(64) if mask >> rank & 1)


def describe(header: bytes) -> str:
    """The header in words, for an error."""
    operation, format_, tag, call, num_bytes = _HEADER.unpack(header)
    try:
        name = Operation(operation).name.lower()
    except ValueError:
        return f"bytes that are no message ({header.hex()})"
    return f"{name} of {num_bytes} bytes ({_FORMAT_NAMES.get(format_, format_)}, tag {tag}, call {call})"
