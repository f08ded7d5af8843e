"""The collectives, written once over ``Endpoint.transfer``: one-shot to all peers, in two steps, or around a ring.

Values that are summed are summed in FP32 in the order of ranks (around a ring: in the ring's order, which differs from
part to part), by one rank or by all from the same bytes, so every rank ends with the same bits. A codec encodes each
value once: who encoded it uses the decoded value too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus.spec.errors import IsthmusError
from isthmus.transport.buffers import bytes_of
from isthmus.transport.codec import BLOCK_VALUES, Codec
from isthmus.transport.endpoint import Endpoint
from isthmus.transport.messages import DTYPE_FORMATS, Operation

ALGORITHMS = ("mesh", "two_step", "ring", "doubling")
_SUM_DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.int64: torch.int64}


def broadcast(end: Endpoint, tensor: Tensor, root: int, codec: str | None) -> None:
    wire = _Wire(end, codec, tensor)
    prefix = end.begin_call(Operation.BROADCAST, wire.format, root)
    if end.rank == root:
        encoded = wire.encode(tensor)
        end.transfer(prefix, [(peer, encoded) for peer in end.peers], [])
        wire.decode_own(tensor, tensor)
    else:
        [received] = wire.room([tensor])
        end.transfer(prefix, [], [(root, received)])
        wire.decode([tensor])


def gather(end: Endpoint, outputs: Sequence[Tensor] | None, tensor: Tensor, root: int, codec: str | None) -> None:
    wire = _Wire(end, codec, tensor)
    prefix = end.begin_call(Operation.GATHER, wire.format, root)
    if end.rank != root:
        end.transfer(prefix, [(root, wire.encode(tensor))], [])
        return
    assert outputs is not None
    others = [outputs[peer] for peer in end.peers]
    end.transfer(prefix, [], list(zip(end.peers, wire.room(others), strict=True)))
    wire.decode(others)
    if wire.codec is not None:
        wire.encode(tensor)
    wire.decode_own(tensor, outputs[root])


def all_gather(end: Endpoint, outputs: Sequence[Tensor], tensor: Tensor, codec: str | None, algorithm: str) -> None:
    wire = _Wire(end, codec, tensor)
    prefix = end.begin_call(Operation.ALL_GATHER, wire.format, ALGORITHMS.index(algorithm))
    _all_gather(end, prefix, wire, outputs, tensor, algorithm == "ring")


def _all_gather(
    end: Endpoint, prefix: bytes, wire: _Wire, outputs: Sequence[Tensor], tensor: Tensor, is_ring: bool
) -> None:
    encoded = wire.encode(tensor)
    others = [outputs[peer] for peer in end.peers]
    received = wire.room(others)
    if is_ring:
        pieces = dict(zip(end.peers, received, strict=True))
        _around_the_ring(end, prefix, pieces | {end.rank: encoded})
    else:
        end.transfer(prefix, [(peer, encoded) for peer in end.peers], list(zip(end.peers, received, strict=True)))
    wire.decode(others)
    wire.decode_own(tensor, outputs[end.rank])


def _around_the_ring(end: Endpoint, prefix: bytes, pieces: dict[int, memoryview]) -> None:
    """Each piece, first at its own rank, passes every rank: N − 1 exchanges with the two neighbours."""
    size, rank = end.world_size, end.rank
    for step in range(size - 1):
        outgoing = ((rank + 1) % size, pieces[(rank - step) % size])
        end.transfer(prefix, [outgoing], [((rank - 1) % size, pieces[(rank - step - 1) % size])])


def all_to_all(end: Endpoint, outputs: Sequence[Tensor], inputs: Sequence[Tensor], codec: str | None) -> None:
    wire = _Wire(end, codec, *inputs)
    prefix = end.begin_call(Operation.ALL_TO_ALL, wire.format, 0)
    outgoing = wire.encode_each(inputs)
    others = [outputs[peer] for peer in end.peers]
    end.transfer(
        prefix, [(peer, outgoing[peer]) for peer in end.peers], list(zip(end.peers, wire.room(others), strict=True))
    )
    wire.decode(others)
    wire.decode_one_of(inputs, end.rank, outputs[end.rank])


def reduce_scatter(end: Endpoint, output: Tensor, inputs: Sequence[Tensor], codec: str | None, algorithm: str) -> None:
    wire = _Wire(end, codec, *inputs)
    prefix = end.begin_call(Operation.REDUCE_SCATTER, wire.format, ALGORITHMS.index(algorithm))
    _reduce_scatter(end, prefix, wire, output, inputs, algorithm == "ring")


def _reduce_scatter(
    end: Endpoint, prefix: bytes, wire: _Wire, output: Tensor, inputs: Sequence[Tensor], is_ring: bool
) -> None:
    if is_ring:
        _ring_reduce_scatter(end, prefix, output, inputs)
        return
    outgoing = wire.encode_each(inputs)
    parts, received = wire.take_parts(inputs[end.rank])
    end.transfer(prefix, [(peer, outgoing[peer]) for peer in end.peers], [(peer, received[peer]) for peer in end.peers])
    wire.add(parts, output, inputs[end.rank])


def _ring_reduce_scatter(end: Endpoint, prefix: bytes, output: Tensor, inputs: Sequence[Tensor]) -> None:
    """Partial sums travel, FP32 (or int64): the part for rank r starts at r + 1 and ends at r."""
    size, rank, dtype = end.world_size, end.rank, _SUM_DTYPES[output.dtype]
    most = max(part.numel() for part in inputs)
    (carried, received), _ = end.scratch.take("ring", (most, most), dtype)
    for step in range(size):
        part = inputs[(rank - 1 - step) % size].view(-1)
        partial = carried[: part.numel()]
        if step == 0:
            partial.copy_(part)
        else:
            torch.add(received[: part.numel()], part, out=partial)
        if step < size - 1:
            coming = received[: inputs[(rank - 2 - step) % size].numel()]
            end.transfer(prefix, [((rank + 1) % size, bytes_of(partial))], [((rank - 1) % size, bytes_of(coming))])
        else:
            output.view(-1).copy_(partial)


def all_reduce(end: Endpoint, tensor: Tensor, codec: str | None, algorithm: str) -> None:
    wire = _Wire(end, codec, tensor)
    prefix = end.begin_call(Operation.ALL_REDUCE, wire.format, ALGORITHMS.index(algorithm))
    if algorithm == "mesh":
        encoded = wire.encode(tensor)
        parts, received = wire.take_parts(tensor)
        end.transfer(prefix, [(peer, encoded) for peer in end.peers], [(peer, received[peer]) for peer in end.peers])
        wire.add(parts, tensor, tensor)
    elif algorithm == "doubling":
        _double(end, prefix, wire, tensor.view(-1))
    else:
        flat = tensor.view(-1)
        chunks = flat.split(even_shares(flat.numel(), end.world_size))
        own = chunks[end.rank]
        _reduce_scatter(end, prefix, wire, own, chunks, algorithm == "ring")
        _all_gather(end, prefix, wire, chunks, own, algorithm == "ring")


def _double(end: Endpoint, prefix: bytes, wire: _Wire, flat: Tensor) -> None:
    """Recursive doubling: log2 N exchanges with one peer each, after which both have the sum of 2, 4, … ranks. Both add
    the same two numbers, and addition commutes: all end with the same bits."""
    distance = 1
    while distance < end.world_size:
        peer = end.rank ^ distance
        encoded = wire.encode(flat)
        [received] = wire.room_to_add(flat)
        end.transfer(prefix, [(peer, encoded)], [(peer, received)])
        wire.add_received(flat)
        distance *= 2


def even_shares(numel: int, num_shares: int) -> list[int]:
    """``numel`` values in shares of whole codec blocks, as even as that allows; the last ones may be smaller or
    empty."""
    share = -(-numel // (num_shares * BLOCK_VALUES)) * BLOCK_VALUES
    return [max(0, min(share, numel - number * share)) for number in range(num_shares)]


def check_summable(tensor: Tensor) -> None:
    if tensor.dtype not in _SUM_DTYPES:
        raise IsthmusError(f"tensor: got {tensor.dtype}, wanted float32, bfloat16 or int64 to sum: convert it first")


class _Wire:
    """How one call's values become payloads: as they lie in memory (no codec), or through scratch and a codec."""

    def __init__(self, end: Endpoint, codec: str | None, *tensors: Tensor) -> None:
        self.dtype = tensors[0].dtype
        self.codec: Codec | None = None
        self.format = DTYPE_FORMATS[self.dtype]
        self._end = end
        if codec is not None:
            self.codec = end.codec(codec)
            self.format = self.codec.wire_id
            if self.dtype != torch.float32:
                raise IsthmusError(
                    f"codec {codec}: got values of {self.dtype}, wanted torch.float32: send them without"
                )

    def _take(self, role: str, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[memoryview]]:
        assert self.codec is not None
        numels = tuple(self.codec.num_bytes(tensor.numel()) for tensor in tensors)
        return self._end.scratch.take(role, numels, torch.uint8)

    def encode(self, tensor: Tensor) -> memoryview:
        return self.encode_each([tensor])[0]

    def encode_each(self, tensors: Sequence[Tensor]) -> list[memoryview]:
        """Payloads to send."""
        if self.codec is None:
            return [bytes_of(tensor) for tensor in tensors]
        self._encoded, views = self._take("encoded", tensors)
        for tensor, encoded in zip(tensors, self._encoded, strict=True):
            self.codec.encode(tensor, encoded)
        return views

    def room(self, tensors: Sequence[Tensor]) -> list[memoryview]:
        """Where payloads for ``tensors`` are received; ``decode`` then makes them values."""
        if self.codec is None:
            return [bytes_of(tensor) for tensor in tensors]
        self._received, views = self._take("received", tensors)
        return views

    def decode(self, tensors: Sequence[Tensor]) -> None:
        if self.codec is not None:
            for tensor, encoded in zip(tensors, self._received, strict=True):
                self.codec.decode(encoded, tensor)

    def decode_own(self, tensor: Tensor, output: Tensor) -> None:
        """What ``encode`` encoded, as the others see it."""
        self.decode_one_of([tensor], 0, output)

    def decode_one_of(self, tensors: Sequence[Tensor], index: int, output: Tensor) -> None:
        if self.codec is not None:
            self.codec.decode(self._encoded[index], output)
        elif output.data_ptr() != tensors[index].data_ptr():
            output.view(-1).copy_(tensors[index].view(-1))

    def take_parts(self, own: Tensor) -> tuple[list[Tensor], list[memoryview]]:
        """Room for one contribution of ``own``'s size per rank: tensors for ``add``, and their bytes. This rank's is
        not used."""
        if self.codec is None:
            return self._end.scratch.take("received", (own.numel(),) * self._end.world_size, self.dtype)
        return self._take("received", [own] * self._end.world_size)

    def room_to_add(self, tensor: Tensor) -> list[memoryview]:
        """Where one contribution of ``tensor``'s size is received; ``add_received`` then adds it."""
        if self.codec is None:
            self._received, views = self._end.scratch.take("received", (tensor.numel(),), self.dtype)
            return views
        return self.room([tensor])

    def add_received(self, flat: Tensor) -> None:
        """``flat`` (or what ``encode`` made of it, as the other sees it) and what was received."""
        if self.codec is None:
            flat.add_(self._received[0])
            return
        [decoded], _ = self._end.scratch.take("sum", (flat.numel(),), torch.float32)
        self.codec.decode(self._encoded[0], flat)
        self.codec.decode(self._received[0], decoded)
        flat.add_(decoded)

    def add(self, parts: list[Tensor], output: Tensor, own: Tensor) -> None:
        """``output`` = the sum of ``parts`` in the order of ranks, with this rank's ``own`` (or its encoding) among
        them."""
        rank, out = self._end.rank, output.view(-1)
        if self.codec is not None:
            own_index = rank if len(self._encoded) > 1 else 0
            parts = [*parts[:rank], self._encoded[own_index], *parts[rank + 1 :]]
            self._add_encoded(self.codec, parts, out)
            return
        parts = [*parts[:rank], own.view(-1), *parts[rank + 1 :]]
        # ``out`` may be ``own``: it is written last.
        [total], _ = self._end.scratch.take("sum", (out.numel(),), _SUM_DTYPES[self.dtype])
        total.copy_(parts[0])
        for part in parts[1:-1]:
            total.add_(part)
        if len(parts) == 1:
            out.copy_(total)
        elif self.dtype == total.dtype:
            torch.add(total, parts[-1], out=out)
        else:
            out.copy_(total.add_(parts[-1]))

    def _add_encoded(self, codec: Codec, parts: list[Tensor], out: Tensor) -> None:
        [decoded], _ = self._end.scratch.take("sum", (out.numel(),), torch.float32)
        codec.decode(parts[0], out)
        for part in parts[1:]:
            codec.decode(part, decoded)
            out.add_(decoded)
