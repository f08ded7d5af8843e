"""The safetensors format, streamed: tensors go between a file and memory in chunks, never a whole shard at once.

A file is an 8-byte little-endian length, that many bytes of JSON (name -> dtype, shape, byte range), then the data. The
library maps a whole file into memory to read it and takes a whole shard to write one; here neither happens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

CHUNK_BYTES = 16 * 1024 * 1024
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file: its shape, its dtype's name in the format, and its first byte counted from the file's
    start."""

    shape: tuple[int, ...]
    dtype: str
    begin_byte: int
    num_bytes: int


class SafetensorsReader:
    """An open file. Close it, or use it as a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises ``FileNotFoundError``, or ``ValueError`` for a file that is truncated or not safetensors."""
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint: {path} is missing")
        self.path = path
        self._file: BinaryIO = path.open("rb")
        try:
            self.tensors = _read_header(path, self._file)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    def read_into(self, key: str, destination: torch.Tensor, first_element: int = 0) -> None:
        """Fills ``destination`` (contiguous, on the CPU) with its number of elements of tensor ``key``, from its
        ``first_element`` on, cast to its dtype. Raises ``ValueError`` for a dtype that holds no plain floating-point
        numbers."""
        stored = self.tensors[key]
        if stored.dtype not in _DTYPES:
            raise ValueError(
                f"checkpoint: {key} in {self.path} is stored as {stored.dtype}, wanted one of {', '.join(_DTYPES)}. "
                "If it is quantised, its config.json must say how (quantization_config)."
            )
        source_dtype = _DTYPES[stored.dtype]
        self._file.seek(stored.begin_byte + first_element * source_dtype.itemsize)
        flat = destination.detach().view(-1)
        if flat.dtype == source_dtype:
            self._fill(key, flat)
            return
        buffer = torch.empty(min(flat.numel(), CHUNK_BYTES // source_dtype.itemsize), dtype=source_dtype)
        for piece in flat.split(max(1, buffer.numel())):
            self._fill(key, buffer[: piece.numel()])
            piece.copy_(buffer[: piece.numel()])

    def read_bytes_into(self, key: str, destination: torch.Tensor, first_byte: int = 0) -> None:
        """Fills ``destination`` (contiguous uint8, on the CPU) with bytes of tensor ``key`` as they are stored."""
        self._file.seek(self.tensors[key].begin_byte + first_byte)
        self._fill(key, destination.view(-1))

    def _fill(self, key: str, flat: torch.Tensor) -> None:
        view = flat.view(torch.uint8).numpy().data
        while view:
            num_read = self._file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
            if not num_read:
                raise ValueError(f"checkpoint: {self.path} ended while reading {key}; it was cut short meanwhile")
            view = view[num_read:]


def _read_header(path: Path, file: BinaryIO) -> dict[str, StoredTensor]:
    num_file_bytes = path.stat().st_size
    header_bytes = int.from_bytes(file.read(8), "little")
    if num_file_bytes < 8 or header_bytes > _MAX_HEADER_BYTES:
        raise ValueError(
            f"checkpoint: {path} ({num_file_bytes} bytes) is not a safetensors file, or its beginning is damaged"
        )
    data_start = 8 + header_bytes
    if num_file_bytes < data_start:
        raise ValueError(
            f"checkpoint: {path} is truncated: {num_file_bytes} bytes, its header alone needs {data_start}"
        )
    try:
        header = json.loads(file.read(header_bytes))
        tensors = {
            key: StoredTensor(
                shape=tuple(entry["shape"]),
                dtype=entry["dtype"],
                begin_byte=data_start + entry["data_offsets"][0],
                num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for key, entry in header.items()
            if key != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint: {path} is not a safetensors file, or its header is damaged ({error})") from error
    for key, stored in tensors.items():
        if stored.begin_byte + stored.num_bytes > num_file_bytes:
            wanted = max(tensor.begin_byte + tensor.num_bytes for tensor in tensors.values())
            raise ValueError(
                f"checkpoint: {path} is truncated: {num_file_bytes} bytes, wanted {wanted}; {key} is not all there"
            )
    return tensors


@dataclass(frozen=True, kw_only=True)
class TensorToWrite:
    """A tensor's name, shape and dtype in the file; its data is asked for when it is written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(path: Path, tensors: list[TensorToWrite], data: Iterable[Iterator[torch.Tensor]]) -> None:
    """Writes one file. ``data`` yields, for each of ``tensors`` in order, its content as tensors to be joined along
    dimension 0 (any dtype and device); at most one of them is held in memory. Raises ``OSError`` (a full disk) as it
    comes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.key] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts on a multiple of 8
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor, pieces in zip(tensors, data, strict=True):
            num_written = sum(_write(file, piece, tensor.dtype) for piece in pieces)
            assert num_written == tensor.num_bytes, f"{tensor.key}: wrote {num_written} of {tensor.num_bytes} bytes"


def _write(file: BinaryIO, tensor: torch.Tensor, dtype: torch.dtype) -> int:
    flat = tensor.detach().reshape(-1)
    for chunk in flat.split(CHUNK_BYTES // dtype.itemsize):
        file.write(chunk.to(device="cpu", dtype=dtype).contiguous().view(torch.uint8).numpy().data)
    return flat.numel() * dtype.itemsize
