"""MXFP4, as gpt-oss is published: 4-bit floats, 32 of which share a power of two.

A weight ``X`` of shape (E, in, out) is stored as ``X_blocks`` (E, out, G, 16), two numbers in a byte with the lower
half first, G = in / 32 groups in a row; and ``X_scales`` (E, out, G), exponents with a bias of 127. A weight is number
× 2^(scale − 127), which FP32 and bf16 hold exactly where it does not overflow. ``E`` experts, ``R`` rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from isthmus.models.quantisation.base import StoredWeights
from isthmus.models.safetensors_file import SafetensorsReader

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP_BYTES = 16
_GROUP = 2 * _GROUP_BYTES
_ROWS = 128
"""Rows that are dequantised at once: they stay in cache until they are written, transposed."""

# Numbers are doubled and scales halved, so that the largest scale, 2^128 by its exponent, is in FP32's range too.
_DOUBLED = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
_DOUBLED_16 = torch.tensor([*_DOUBLED, *(-number for number in _DOUBLED)])
_BYTES_256 = torch.arange(256)
_PAIRS_256x2 = torch.stack((_DOUBLED_16[_BYTES_256 & 15], _DOUBLED_16[_BYTES_256 >> 4]), dim=1)
_HALVED_256 = torch.ldexp(torch.ones(256), _BYTES_256 - 128)


class Mxfp4Weights(StoredWeights):
    """Weights of which some, by their names, are stored in MXFP4."""

    def __init__(self, readers: Iterable[SafetensorsReader], quantisation: Mapping[str, Any]) -> None:
        super().__init__(readers)

    def weight_name(self, key: str) -> str | None:
        if self._is_blocks(key):
            return key.removesuffix(_BLOCKS)
        is_scales = key.endswith(_SCALES) and self._is_blocks(key.removesuffix(_SCALES) + _BLOCKS)
        return None if is_scales else key

    def shape(self, key: str) -> tuple[int, ...]:
        if not self._is_blocks(key):
            return super().shape(key)
        num_experts, num_out, num_groups = self._checked_shape(key)
        return num_experts, num_groups * _GROUP, num_out

    def read_into(self, key: str, destination: torch.Tensor, first_element: int) -> None:
        """As in the base class; ``destination`` is one expert, (in, out)."""
        if not self._is_blocks(key):
            super().read_into(key, destination, first_element)
            return
        _, num_out, num_groups = self._checked_shape(key)
        expert = first_element // destination.numel()
        num_scales = num_out * num_groups
        scales = self._read_bytes(key.removesuffix(_BLOCKS) + _SCALES, (num_out, num_groups), expert * num_scales)
        blocks = self._read_bytes(key, (num_out, num_groups * _GROUP_BYTES), expert * num_scales * _GROUP_BYTES)
        by_column = destination.detach().T
        for rows, blocks_R, scales_R in zip(
            by_column.split(_ROWS), blocks.split(_ROWS), scales.split(_ROWS), strict=True
        ):
            rows.copy_(_dequantise(blocks_R, scales_R))

    def _is_blocks(self, key: str) -> bool:
        return key.endswith(_BLOCKS) and self._holds(key, "U8")

    def _checked_shape(self, key: str) -> tuple[int, int, int]:
        """(experts, out, groups). Raises ``IsthmusError`` if blocks and scales do not belong together."""
        stored, scales_key = self.stored(key), key.removesuffix(_BLOCKS) + _SCALES
        scales = self._require_scales(key, scales_key)
        if len(stored.shape) != 4 or stored.shape[-1] != _GROUP_BYTES:
            raise self._fail(key, f"the shape (experts, out, groups, {_GROUP_BYTES})")
        if scales.dtype != "U8" or scales.shape != stored.shape[:-1]:
            raise self._fail(scales_key, f"U8 of shape {stored.shape[:-1]}, one scale for each group of {key}")
        return stored.shape[:-1]


def _dequantise(blocks_RB: torch.Tensor, scales_RG: torch.Tensor) -> torch.Tensor:
    """Rows of bytes and of exponents -> (R, 32 · G) in FP32."""
    numbers = _PAIRS_256x2.index_select(0, blocks_RB.reshape(-1).int())
    scales = _HALVED_256.index_select(0, scales_RG.reshape(-1).int())
    return numbers.view(-1, _GROUP).mul_(scales[:, None]).view(len(blocks_RB), -1)
