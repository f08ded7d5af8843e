"""The policy where there is no separate memory: every expert runs in place."""

from __future__ import annotations

from torch import Tensor

from isthmus.spec.model import UnitKey
from isthmus.spec.plan import LayerSplit
from isthmus.tuning.protocols import Policy


class InPlace(Policy):
    """Nothing to decide, nothing to load."""

    name = "in-place"

    def __init__(self) -> None:
        self._counts: dict[int, list[int]] = {}

    def begin_step(self) -> None: ...

    def begin_forward(self) -> None: ...

    def layer_ready(self, layer: int) -> None: ...

    def enter_forward(self, layer: int) -> None: ...

    def split_forward(self, layer: int, counts_E: list[int], hidden_TH: Tensor, index_Tk: Tensor) -> LayerSplit:
        return LayerSplit(on_accelerator=tuple(range(len(counts_E))), on_cpu=())

    def begin_backward(self, counts_LE: dict[int, list[int]], *, is_last: bool) -> None:
        self._counts = counts_LE

    def enter_backward(self, layer: int) -> None: ...

    def split_backward(self, layer: int) -> LayerSplit:
        return LayerSplit(on_accelerator=tuple(range(len(self._counts[layer]))), on_cpu=())

    def leave_backward(self, layer: int) -> None: ...

    def next_use(self, key: UnitKey) -> float:
        return 0.0
