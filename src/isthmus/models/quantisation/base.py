"""The weights in a checkpoint's files, read by name, whatever file they are in and however they are stored.

Here they are stored plainly; the other files of this package derive from that for weights that are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from isthmus.models.safetensors_file import SafetensorsReader, StoredTensor
from isthmus.spec.errors import IsthmusError


class StoredWeights:
    """Plain weights. A quantised one is several tensors (numbers and scales), which may lie in different files."""

    def __init__(self, readers: Iterable[SafetensorsReader]) -> None:
        """``readers`` stay the caller's, who keeps them open while this is used."""
        self._reader_of = {key: reader for reader in readers for key in reader.tensors}

    def weight_name(self, key: str) -> str | None:
        """The weight that is read from the stored tensor ``key``; ``None`` if that is only read along with another."""
        return key

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape that the module gives to the weight in ``key``."""
        return self.stored(key).shape

    def read_into(self, key: str, destination: torch.Tensor, first_element: int) -> None:
        """Fills ``destination`` (contiguous, on the CPU, FP32 or bf16) with elements of the weight in ``key``, in the
        order of ``shape`` from ``first_element`` on; of quantised weights, with one whole matrix.

        Raises ``ValueError``, with file and tensor, for what is not stored as it must be.
        """
        self._reader_of[key].read_into(key, destination, first_element)

    def file(self, key: str) -> Path:
        return self._reader_of[key].path

    def stored(self, key: str) -> StoredTensor:
        return self._reader_of[key].tensors[key]

    def _holds(self, key: str, dtype: str) -> bool:
        return key in self._reader_of and self.stored(key).dtype == dtype

    def _read_bytes(self, key: str, shape: tuple[int, ...], first_byte: int) -> torch.Tensor:
        """A new uint8 tensor with bytes of ``key`` as they are stored."""
        raw = torch.empty(shape, dtype=torch.uint8)
        self._reader_of[key].read_bytes_into(key, raw, first_byte)
        return raw

    def _require_scales(self, key: str, scales_key: str) -> StoredTensor:
        if scales_key not in self._reader_of:
            raise IsthmusError(
                f"checkpoint: {key} in {self.file(key)} is stored as {self.stored(key).dtype}, but its scales, "
                f"{scales_key}, are in no file. Download the checkpoint again."
            )
        return self.stored(scales_key)

    def _fail(self, key: str, wanted: str) -> IsthmusError:
        stored = self.stored(key)
        return IsthmusError(
            f"checkpoint: {key} in {self.file(key)} is {stored.dtype} of shape {stored.shape}, wanted {wanted}. "
            "Download the checkpoint again, or take an unquantised copy of the model."
        )
