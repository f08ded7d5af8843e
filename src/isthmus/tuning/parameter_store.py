"""Host memory for everything that is trained: weights, FP32 masters, gradients and Adam moments, one range per unit.

The store owns a few large slabs per kind and hands out views of them. Each unit has one contiguous range per kind,
aligned to ``ALIGNMENT_BYTES``, at the same place in the slabs of every kind, with zeros in the padding behind it: units
that lie side by side can be worked on as one range. An FP32 unit's weight is its own master, so nothing is kept twice.
Weights and gradients, which travel to and from the accelerator, come from its ``allocate_host`` (pinned under CUDA);
masters and moments never leave the host and come from zero pages that cost no memory before they are first written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from isthmus.spec.model import UnitKey, UnitLayout

ALIGNMENT_BYTES = 64
"""A cache line, which is also the widest vector register."""
DEFAULT_SLAB_BYTES = 4 << 30
KINDS = ("weight", "master", "gradient", "exp_avg", "exp_avg_sq")

_TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class _Place:
    """Elements ``start`` to ``end`` of slab ``slab``, padding included."""

    slab: int
    start: int
    end: int


class ParameterStore:
    """All units of a model in host memory.

    ``allocate_host(shape, dtype)`` returns zeroed host memory. No slab is larger than ``slab_bytes``, except that a
    unit is never split. Accessors return views and may be called from any thread; who may write when is the optimizer's
    and the trainer's agreement, not the store's.
    """

    def __init__(
        self, layouts: Mapping[UnitKey, UnitLayout], allocate_host: Allocate, *, slab_bytes: int = DEFAULT_SLAB_BYTES
    ) -> None:
        for key, layout in layouts.items():
            if layout.dtype not in _TORCH_DTYPES:
                raise ValueError(f"layouts[{key}].dtype: got {layout.dtype!r}, want one of {sorted(_TORCH_DTYPES)}")
        self._layouts = {key: layouts[key] for key in sorted(layouts)}
        self._places: dict[UnitKey, _Place] = {}
        self._slabs: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        for name, dtype in _TORCH_DTYPES.items():
            numels = {key: layout.numel for key, layout in self._layouts.items() if layout.dtype == name}
            places, slab_numels = _place(numels, dtype, slab_bytes, first_slab=len(self._slabs["weight"]))
            self._places |= places
            for numel in slab_numels:
                weight = _allocate_aligned(numel, dtype, allocate_host)
                self._slabs["weight"].append(weight)
                self._slabs["gradient"].append(_allocate_aligned(numel, dtype, allocate_host))
                has_master = dtype != torch.float32
                self._slabs["master"].append(_allocate_untouched(numel) if has_master else weight)
                self._slabs["exp_avg"].append(_allocate_untouched(numel))
                self._slabs["exp_avg_sq"].append(_allocate_untouched(numel))
        self._ranges = {
            kind: {key: self.span(kind, (key,))[: layout.numel] for key, layout in self._layouts.items()}
            for kind in KINDS
        }

    @property
    def keys(self) -> tuple[UnitKey, ...]:
        """Every unit, sorted."""
        return tuple(self._layouts)

    @property
    def layouts(self) -> Mapping[UnitKey, UnitLayout]:
        return self._layouts

    def layout(self, key: UnitKey) -> UnitLayout:
        return self._layouts[key]

    def numel(self, key: UnitKey) -> int:
        return self._ranges["weight"][key].numel()

    def weight(self, key: UnitKey) -> Tensor:
        """(numel,), the unit's dtype: what computes."""
        return self._ranges["weight"][key]

    def master(self, key: UnitKey) -> Tensor:
        """(numel,), FP32: what is optimised. For an FP32 unit this is ``weight(key)`` itself."""
        return self._ranges["master"][key]

    def gradient(self, key: UnitKey) -> Tensor:
        """(numel,), the unit's dtype."""
        return self._ranges["gradient"][key]

    def exp_avg(self, key: UnitKey) -> Tensor:
        """(numel,), FP32: Adam's first moment."""
        return self._ranges["exp_avg"][key]

    def exp_avg_sq(self, key: UnitKey) -> Tensor:
        """(numel,), FP32: Adam's second moment."""
        return self._ranges["exp_avg_sq"][key]

    def named(self, key: UnitKey, kind: str = "weight") -> dict[str, Tensor]:
        """Views of one kind (one of ``KINDS``) of the unit, by tensor name, shaped as its layout says."""
        if kind not in KINDS:
            raise ValueError(f"kind: got {kind!r}, want one of {KINDS}")
        tensors = self._layouts[key].tensors
        parts = self._ranges[kind][key].split([tensor.numel for tensor in tensors])
        return {tensor.name: part.view(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)}

    def publish(self, key: UnitKey) -> None:
        """Writes the master, rounded to the unit's dtype, into the weight. Nothing to do for an FP32 unit."""
        if self.weight(key).dtype != torch.float32:
            self.weight(key).copy_(self.master(key))

    def runs(self, keys: Iterable[UnitKey]) -> list[list[UnitKey]]:
        """``keys``, sorted and cut into runs of units of one dtype that lie side by side in the slabs of every kind."""
        runs: list[list[UnitKey]] = []
        end = None
        for key in sorted(keys, key=lambda key: (self._places[key].slab, self._places[key].start, key)):
            place = self._places[key]
            if end != (place.slab, place.start):
                runs.append([])
            runs[-1].append(key)
            end = (place.slab, place.end)
        return runs

    def span(self, kind: str, run: Sequence[UnitKey]) -> Tensor:
        """One kind of a whole run as one flat range, the padding behind each unit included (which must stay zero)."""
        first, last = self._places[run[0]], self._places[run[-1]]
        return self._slabs[kind][first.slab][first.start : last.end]

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of the slabs by kind: all ranges with their padding (FP32 units have no separate master)."""
        own = {kind: [slab.nbytes for slab in slabs] for kind, slabs in self._slabs.items()}
        pairs = zip(self._slabs["master"], self._slabs["weight"], strict=True)
        own["master"] = [master.nbytes for master, weight in pairs if master is not weight]
        return {kind: sum(sizes) for kind, sizes in own.items()}

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_by_kind().values())


def _place(
    numels: Mapping[UnitKey, int], dtype: torch.dtype, slab_bytes: int, first_slab: int
) -> tuple[dict[UnitKey, _Place], list[int]]:
    """Places units of one dtype in slabs, in the order of ``numels``; also returns the elements of each slab.

    Ranges are padded so that they are aligned in ``dtype`` (and so in FP32); FP32 slabs keep to ``slab_bytes``.
    """
    step = ALIGNMENT_BYTES // dtype.itemsize
    places: dict[UnitKey, _Place] = {}
    slab_numels: list[int] = []
    for key, numel in numels.items():
        padded = -(-numel // step) * step
        if not slab_numels or (slab_numels[-1] + padded) * torch.float32.itemsize > slab_bytes:
            slab_numels.append(0)
        start = slab_numels[-1]
        places[key] = _Place(first_slab + len(slab_numels) - 1, start, start + padded)
        slab_numels[-1] += padded
    return places, slab_numels


def _allocate_aligned(numel: int, dtype: torch.dtype, allocate: Allocate) -> Tensor:
    """Asks for one alignment unit more than needed, and starts at the first aligned element."""
    slab = allocate((numel + ALIGNMENT_BYTES // dtype.itemsize,), dtype)
    start = -slab.data_ptr() % ALIGNMENT_BYTES // dtype.itemsize
    return slab[start : start + numel]


def _allocate_untouched(numel: int) -> Tensor:
    """Zeroed FP32 memory without touching it: ``numpy.zeros`` is a calloc, ``torch.zeros`` writes every page."""

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(numpy.zeros(shape, numpy.float32))

    return _allocate_aligned(numel, torch.float32, allocate)
