"""Fine-grained FP8, as DeepSeek-V3 is published: numbers in e4m3, one FP32 scale for each block of a matrix.

A weight ``X`` is stored as ``X`` itself, float8_e4m3fn, and ``X_scale_inv``: one scale per ``weight_block_size`` block
(128 × 128), where the blocks at the right and lower edges may be cut short, or one for the whole matrix. A weight is
number × scale, rounded once, to FP32.

transformers 5.23 takes as block size the matrix's divided by the number of scales, which is the same where blocks fit;
where they do not, it raises (DeepSeek-V3's ``kv_a_proj_with_mqa``, 576 rows) or takes blocks of another size than the
matrix was quantised with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from isthmus.models.quantisation.base import StoredWeights
from isthmus.models.safetensors_file import SafetensorsReader
from isthmus.spec.errors import IsthmusError

_DTYPE = "F8_E4M3"
_SCALES = "_scale_inv"
_ACTIVATION_SCALE = ".activation_scale"
_BLOCK = (128, 128)


class Fp8Weights(StoredWeights):
    """Weights of which some, by their dtype, are stored in FP8."""

    def __init__(self, readers: Iterable[SafetensorsReader], quantisation: Mapping[str, Any]) -> None:
        """Raises ``IsthmusError`` for a ``weight_block_size`` that is none."""
        super().__init__(readers)
        block = quantisation.get("weight_block_size", _BLOCK)
        self._has_blocks = block is not None
        if self._has_blocks and not _is_block_size(block):
            raise IsthmusError(
                f"quantization_config.weight_block_size: got {block!r}, wanted two positive integers such as "
                "[128, 128], or null for one scale per matrix. Correct config.json."
            )
        # One scale for the whole matrix is the same scale in every block, of whatever size.
        self._block_rows, self._block_columns = block if self._has_blocks else _BLOCK

    def weight_name(self, key: str) -> str | None:
        if key.endswith(_SCALES) and key.removesuffix(_SCALES) in self._reader_of:
            return None
        # For quantised activations, which nothing here computes.
        is_for_activations = key.endswith(_ACTIVATION_SCALE) and self._holds(
            key.removesuffix(_ACTIVATION_SCALE) + ".weight", _DTYPE
        )
        return None if is_for_activations else key

    def read_into(self, key: str, destination: torch.Tensor, first_element: int) -> None:
        """As in the base class; a quantised ``destination`` is one matrix of the last two dimensions of ``shape``."""
        if self.stored(key).dtype == _DTYPE:
            self._dequantise_into(key, destination, first_element)
        elif key + _SCALES in self._reader_of:
            raise self._fail(key, f"{_DTYPE}, since there is {key + _SCALES}")
        else:
            super().read_into(key, destination, first_element)

    def _dequantise_into(self, key: str, destination: torch.Tensor, first_element: int) -> None:
        if destination.dim() != 2:
            raise self._fail(key, "a matrix, or one per expert: only those are read from FP8")
        scales = self._read_scales(key, first_element // destination.numel())
        scales_by_column = scales.repeat_interleave(self._block_columns, dim=1)[:, : destination.shape[1]]
        for rows, scales in zip(destination.detach().split(self._block_rows), scales_by_column, strict=True):
            numbers = self._read_bytes(key, tuple(rows.shape), first_element).view(torch.float8_e4m3fn)
            rows.copy_(numbers.float().mul_(scales))
            first_element += rows.numel()

    def _read_scales(self, key: str, matrix: int) -> torch.Tensor:
        """The scales of matrix number ``matrix`` in FP32, by row and column of blocks."""
        shape, scales_key = self.stored(key).shape, key + _SCALES
        stacked, (rows, columns) = shape[:-2], shape[-2:]
        grid = (-(-rows // self._block_rows), -(-columns // self._block_columns))
        found = self._require_scales(key, scales_key).shape
        if found == (*stacked, 1, 1) or (not stacked and found in ((), (1,))):
            scale = torch.empty(1, 1)
            self._reader_of[scales_key].read_into(scales_key, scale, matrix)
            return scale.expand(grid)
        if not self._has_blocks or found != (*stacked, *grid):
            wanted = (*stacked, *(grid if self._has_blocks else (1, 1)))
            raise self._fail(scales_key, f"the shape {wanted} for {key} of shape {shape}")
        scales = torch.empty(grid)
        self._reader_of[scales_key].read_into(scales_key, scales, matrix * scales.numel())
        return scales


def _is_block_size(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value)
