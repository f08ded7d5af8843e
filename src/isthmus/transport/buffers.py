"""Memory of a group: tensors seen as bytes, and scratch that grows to the largest call and is then used again."""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGNMENT_BYTES = 64
# Call shapes whose views are kept. A model has few; a caller with ever new ones must not fill the memory.
_MOST_KEPT = 128

Pieces = tuple[list[Tensor], list[memoryview]]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as writable bytes. Shares it; the view keeps it alive."""
    if not tensor.numel():
        return memoryview(bytearray())
    if tensor.dtype == torch.bfloat16:  # numpy has no such type
        tensor = tensor.view(torch.int16)
    return tensor.numpy().data.cast("B")


class Scratch:
    """Temporary tensors by role. What ``take`` returned is valid until the role's next ``take``."""

    def __init__(self) -> None:
        self._arenas: dict[str, Tensor] = {}
        self._pieces: dict[tuple[str, tuple[int, ...], torch.dtype], Pieces] = {}

    def take(self, role: str, numels: tuple[int, ...], dtype: torch.dtype) -> Pieces:
        """Uninitialised flat tensors of ``numels`` values, and the bytes of each. Asking again costs one look-up."""
        key = (role, numels, dtype)
        if (pieces := self._pieces.get(key)) is None:
            if len(self._pieces) >= _MOST_KEPT:
                self._pieces.clear()
            pieces = self._pieces[key] = self._cut(role, numels, dtype)
        return pieces

    def _cut(self, role: str, numels: tuple[int, ...], dtype: torch.dtype) -> Pieces:
        rooms = [-(-numel * dtype.itemsize // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for numel in numels]
        arena = self._arenas.get(role)
        if arena is None or arena.numel() < sum(rooms):
            self._pieces = {key: pieces for key, pieces in self._pieces.items() if key[0] != role}
            arena = self._arenas[role] = torch.empty(sum(rooms), dtype=torch.uint8)
        tensors, start = [], 0
        for numel, room in zip(numels, rooms, strict=True):
            tensors.append(arena[start : start + numel * dtype.itemsize].view(dtype))
            start += room
        return tensors, [bytes_of(tensor) for tensor in tensors]
