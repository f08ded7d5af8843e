"""What values look like on the wire: codecs by name, each from FP32 values to bytes and back, with a bound on the
error.

``fp32`` sends values as they are, ``bf16`` rounds them, ``int8`` and ``int4`` send a small integer per value and one
bf16 scale per block of 64 values (8.25 and 4.25 bits a value). Whoever decodes the same bytes gets the same bits:
decoding is one exact conversion and one multiplication, the same on every machine.

Values that are not finite: ``fp32`` and ``bf16`` carry them. ``int8`` and ``int4`` cannot, so a block in which a value
is nan, infinite or at least 2**127 in size decodes to nan as a whole: it is seen, not hidden. Zeros decode to zeros.

Shape legend: ``V`` values, ``B`` blocks, ``K`` values of a block (64).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from isthmus.spec.errors import IsthmusError

BLOCK_VALUES = 64
# Blocks that one pass of temporaries covers: 256 KiB of FP32, which stay in the second-level cache.
_PASS_BLOCKS = 1024
# Least scale. Its reciprocal is finite and it is a normal bf16 number; a block of smaller values decodes to zeros.
_LEAST_SCALE = 2.0**-119
# A scale is rounded to bf16, by at most this much of it. The largest value is then at most 127 · (1 + 2**-8) < 127.5
# steps, which still rounds to 127: codes need no clamping.
_SCALE_ROUNDING = 2.0**-8


class Codec(ABC):
    """One encoding. Instances keep scratch memory: one belongs to one thread at a time."""

    name: str
    wire_id: int
    """What stands for the codec in a message's header."""

    @abstractmethod
    def num_bytes(self, num_values: int) -> int:
        """Bytes on the wire of ``num_values`` values."""

    @abstractmethod
    def error_bound(self, largest: float) -> float:
        """The most by which a decoded value can differ from what was encoded, where ``largest`` is the largest size of
        a finite value in its block (``int8``, ``int4``) or the value's own (``fp32``, ``bf16``)."""

    def encode(self, values_V: Tensor, out: Tensor) -> None:
        """Writes ``values_V`` (FP32, CPU, contiguous, taken as flat) to ``out`` (uint8 ``[num_bytes(V)]``, contiguous,
        at an even address). Raises ``IsthmusError`` for another dtype or number of bytes."""
        self._check("values_V", values_V, out)
        if values_V.numel():
            self._encode(values_V.view(-1), out)

    def decode(self, encoded: Tensor, out_V: Tensor) -> None:
        """Writes to ``out_V`` (FP32, CPU, contiguous, taken as flat) what ``encode`` made ``encoded`` of. Raises as
        ``encode`` does."""
        self._check("out_V", out_V, encoded)
        if out_V.numel():
            self._decode(encoded, out_V.view(-1))

    @abstractmethod
    def _encode(self, values_V: Tensor, out: Tensor) -> None: ...

    @abstractmethod
    def _decode(self, encoded: Tensor, out_V: Tensor) -> None: ...

    def _check(self, name: str, values_V: Tensor, encoded: Tensor) -> None:
        if values_V.dtype != torch.float32:
            raise IsthmusError(f"codec {self.name}: {name} is {values_V.dtype}, wanted torch.float32: convert it first")
        wanted = self.num_bytes(values_V.numel())
        if encoded.dtype != torch.uint8 or encoded.numel() != wanted:
            raise IsthmusError(
                f"codec {self.name}: {values_V.numel()} values need {wanted} bytes (torch.uint8), "
                f"got {encoded.numel()} of {encoded.dtype}: ask num_bytes"
            )


class Fp32(Codec):
    """Values as they are."""

    name, wire_id = "fp32", 1

    def num_bytes(self, num_values: int) -> int:
        return 4 * num_values

    def error_bound(self, largest: float) -> float:
        return 0.0

    def _encode(self, values_V: Tensor, out: Tensor) -> None:
        out.copy_(values_V.view(torch.uint8))

    def _decode(self, encoded: Tensor, out_V: Tensor) -> None:
        out_V.view(torch.uint8).copy_(encoded)


class Bf16(Codec):
    """Values rounded to the nearest bf16 number. What is above the largest one (3.39e38) becomes infinite."""

    name, wire_id = "bf16", 2

    def num_bytes(self, num_values: int) -> int:
        return 2 * num_values

    def error_bound(self, largest: float) -> float:
        # Half a unit in the last of 8 places; below the normal numbers half of their spacing, 2**-133.
        return max(largest * 2.0**-8, 2.0**-134)

    def _encode(self, values_V: Tensor, out: Tensor) -> None:
        out.view(torch.bfloat16).copy_(values_V)

    def _decode(self, encoded: Tensor, out_V: Tensor) -> None:
        out_V.copy_(encoded.view(torch.bfloat16))


class BlockCodec(Codec):
    """Symmetric integers of ``-levels … levels`` times a scale per block. On the wire: all codes, then all scales; the
    last block is filled up with zeros."""

    levels: int
    block_code_bytes: int

    def __init__(self) -> None:
        # Whether or not who makes or first uses it is in inference mode, later calls may be in the other.
        with torch.inference_mode(False):
            self._tail_K = torch.empty(1, BLOCK_VALUES)
        self._allocate(1)

    def num_bytes(self, num_values: int) -> int:
        return -(-num_values // BLOCK_VALUES) * (self.block_code_bytes + 2)

    def error_bound(self, largest: float) -> float:
        scale = max(largest / self.levels * (1 + _SCALE_ROUNDING), _LEAST_SCALE)
        # Half a step, and what FP32 rounds in value × factor and code × scale.
        return scale / 2 + largest * 2.0**-21

    @abstractmethod
    def _pack(self, work_BK: Tensor, codes: Tensor) -> None:
        """Whole numbers in ``work_BK`` (FP32, may be overwritten) to ``codes`` (uint8 ``[B, block_code_bytes]``)."""

    @abstractmethod
    def _unpack(self, codes: Tensor, out_BK: Tensor) -> None:
        """The inverse of ``_pack``."""

    def _encode(self, values_V: Tensor, out: Tensor) -> None:
        codes, scales_B = self._split(out)
        num_whole = values_V.numel() // BLOCK_VALUES
        values_BK = values_V[: num_whole * BLOCK_VALUES].view(num_whole, BLOCK_VALUES)
        for start in range(0, num_whole, _PASS_BLOCKS):
            part = slice(start, min(start + _PASS_BLOCKS, num_whole))
            self._encode_blocks(values_BK[part], codes[part], scales_B[part])
        if num_whole < len(codes):
            tail = values_V[num_whole * BLOCK_VALUES :]
            self._tail_K.zero_()[0, : tail.numel()] = tail
            self._encode_blocks(self._tail_K, codes[num_whole:], scales_B[num_whole:])

    def _decode(self, encoded: Tensor, out_V: Tensor) -> None:
        codes, scales_B = self._split(encoded)
        num_whole = out_V.numel() // BLOCK_VALUES
        out_BK = out_V[: num_whole * BLOCK_VALUES].view(num_whole, BLOCK_VALUES)
        for start in range(0, num_whole, _PASS_BLOCKS):
            part = slice(start, min(start + _PASS_BLOCKS, num_whole))
            self._decode_blocks(codes[part], scales_B[part], out_BK[part])
        if num_whole < len(codes):
            self._decode_blocks(codes[num_whole:], scales_B[num_whole:], self._tail_K)
            tail = out_V[num_whole * BLOCK_VALUES :]
            tail.copy_(self._tail_K[0, : tail.numel()])

    def _split(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        num_blocks = encoded.numel() // (self.block_code_bytes + 2)
        codes = encoded[: num_blocks * self.block_code_bytes].view(num_blocks, self.block_code_bytes)
        return codes, encoded[num_blocks * self.block_code_bytes :].view(torch.bfloat16)

    def _encode_blocks(self, values_BK: Tensor, codes: Tensor, scales_B: Tensor) -> None:
        work_BK, largest_B, factors_B = self._scratch(len(codes))
        torch.abs(values_BK, out=work_BK)
        torch.amax(work_BK, dim=1, out=largest_B)
        # 0 for what can be encoded; inf − inf and nan − nan are nan, which the scale then is.
        torch.add(largest_B, largest_B, out=factors_B).sub_(factors_B)
        factors_B.add_(largest_B, alpha=1 / self.levels).clamp_(min=_LEAST_SCALE)
        scales_B.copy_(factors_B)
        factors_B.copy_(scales_B).reciprocal_()
        torch.mul(values_BK, factors_B.unsqueeze(1), out=work_BK).round_()
        self._pack(work_BK, codes)

    def _decode_blocks(self, codes: Tensor, scales_B: Tensor, out_BK: Tensor) -> None:
        _, scales32_B, _ = self._scratch(len(codes))
        self._unpack(codes, out_BK)
        out_BK.mul_(scales32_B.copy_(scales_B).unsqueeze(1))

    def _allocate(self, num_blocks: int) -> None:
        with torch.inference_mode(False):
            self._work_BK = torch.empty(num_blocks, BLOCK_VALUES)
            self._scales_B, self._factors_B = torch.empty(num_blocks), torch.empty(num_blocks)

    def _scratch(self, num_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        if len(self._scales_B) < num_blocks:
            self._allocate(num_blocks)
        return self._work_BK[:num_blocks], self._scales_B[:num_blocks], self._factors_B[:num_blocks]


class Int8(BlockCodec):
    """One byte a value, 127 levels to either side."""

    name, wire_id = "int8", 3
    levels, block_code_bytes = 127, BLOCK_VALUES

    def _pack(self, work_BK: Tensor, codes: Tensor) -> None:
        codes.view(torch.int8).copy_(work_BK)

    def _unpack(self, codes: Tensor, out_BK: Tensor) -> None:
        out_BK.copy_(codes.view(torch.int8))


class Int4(BlockCodec):
    """Two values a byte, seven levels to either side: value i of a block in the low half of byte i, value i + 32 in the
    high half, both plus 8."""

    name, wire_id = "int4", 4
    levels, block_code_bytes = 7, BLOCK_VALUES // 2

    def _pack(self, work_BK: Tensor, codes: Tensor) -> None:
        low, high = work_BK.split(BLOCK_VALUES // 2, dim=1)
        codes.copy_(low.add_(high, alpha=16).add_(8 * 16 + 8))

    def _unpack(self, codes: Tensor, out_BK: Tensor) -> None:
        low, high = out_BK.split(BLOCK_VALUES // 2, dim=1)
        low.copy_(codes & 15)
        high.copy_(codes >> 4)
        out_BK.sub_(8)


_CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Fp32, Bf16, Int8, Int4)}
CODEC_NAMES = tuple(_CODECS)


def create_codec(name: str) -> Codec:
    """A codec of its own scratch memory. Raises ``IsthmusError`` for a name not in ``CODEC_NAMES``."""
    if name not in _CODECS:
        raise IsthmusError(f"codec: got {name!r}, wanted one of {', '.join(CODEC_NAMES)}")
    return _CODECS[name]()
