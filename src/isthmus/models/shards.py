"""Reads parts of a checkpoint: a device's rows and columns of each matrix, and nothing else.

The files are mapped into memory, so what is not asked for is never read, and what was read is dropped (``release``): no
device ever needs room for the whole model.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from isthmus.models.checkpoint_files import checkpoint_files
from isthmus.models.transformer_families import Stored, read_family
from isthmus.spec.errors import IsthmusError
from isthmus.spec.transformer import Range

_SAMPLED_VALUES = 64


class ShardReader:
    """A checkpoint directory of a supported family, open for reading in parts.

    ``config``, ``family`` and ``spec`` say what it is.
    """

    def __init__(self, directory: Path) -> None:
        """Raises ``IsthmusError`` for another architecture or a damaged file, ``FileNotFoundError`` for none."""
        self.directory = directory
        self.config, self.family, self.spec = read_family(directory)
        self._files: dict[str, Any] = {}
        self.release()
        self._prefix = self.family.prefix_in(self._files)

    def release(self) -> None:
        """Maps the files anew: what was read so far no longer counts as this process's memory. Nor does what was freed
        since, which GNU's C library would keep."""
        self._files.clear()
        for path in checkpoint_files(self.directory):
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise IsthmusError(
                    f"checkpoint: {path} is truncated or not a safetensors file ({error}); download it again"
                ) from error
            self._files.update(dict.fromkeys(file.keys(), file))
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)

    def has(self, name: str, layer: int | None = None) -> bool:
        """Whether the checkpoint has the uniform tensor (see ``transformer_families``)."""
        base = name.rpartition(".")[0]
        names = {"head"} if base == "head" else self.family.outer if layer is None else self.family.layer
        return base in names and self.family.stored(layer, name, self._prefix).key in self._files

    def read(
        self, name: str, layer: int | None = None, *, rows: Range | None = None, columns: Range | None = None
    ) -> torch.Tensor:
        """A uniform tensor, or its ``rows`` (outputs) and ``columns`` (inputs): a new contiguous FP32 tensor.

        Raises ``IsthmusError`` where the checkpoint lacks it.
        """
        stored = self._find(name, layer)
        view = self._files[stored.key].get_slice(stored.key)
        shape = view.get_shape()
        if len(shape) == 1:
            num_rows, num_columns = shape[0] // stored.num_parts, None
        else:
            num_columns, num_rows = shape if stored.is_transposed else reversed(shape)
            num_rows //= stored.num_parts
        first = stored.part * num_rows
        wanted_rows = Range(start=0, stop=num_rows) if rows is None else rows
        row_slice = slice(first + wanted_rows.start, first + wanted_rows.stop)
        if num_columns is None:
            return view[row_slice].to(torch.float32, copy=True)
        wanted_columns = Range(start=0, stop=num_columns) if columns is None else columns
        column_slice = slice(wanted_columns.start, wanted_columns.stop)
        if stored.is_transposed:
            return view[column_slice, row_slice].float().T.contiguous()
        return view[row_slice, column_slice].to(torch.float32, copy=True)

    def table(self, name: str) -> torch.Tensor:
        """A uniform tensor outside of the layers as it is stored, mapped: rows are read when they are looked up."""
        key = self._find(name, None).key
        return self._files[key].get_tensor(key)

    def _find(self, name: str, layer: int | None) -> Stored:
        stored = self.family.stored(layer, name, self._prefix)
        if stored.key not in self._files:
            raise IsthmusError(f"checkpoint: {self.directory} lacks {stored.key}; it does not fit its config.json")
        return stored

    def digest(self) -> str:
        """A short name of configuration and weights, the same on every device that has the same model.

        The weights are told by names, shapes and some values of each: a fine-tuned sibling differs, and nothing is read
        as a whole.
        """
        hashed = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True, default=str).encode())
        for key in sorted(self._files):
            view = self._files[key].get_slice(key)
            shape = view.get_shape()
            hashed.update(f"{key} {shape} {view.get_dtype()}".encode())
            if shape and shape[0]:
                row = view[shape[0] // 2 : shape[0] // 2 + 1].flatten()[:_SAMPLED_VALUES]
                hashed.update(row.float().numpy().tobytes())
        return hashed.hexdigest()[:16]
