"""Where a policy sits: the engine and the loader talk to the seat, so the policy in it can be changed between steps."""

from __future__ import annotations

from torch import Tensor

from isthmus.spec.model import UnitKey
from isthmus.spec.plan import LayerSplit
from isthmus.tuning.protocols import Policy


class PolicySeat(Policy):
    """Passes everything on to ``policy``. Change it only between steps, and call ``begin_step`` and ``layer_ready``
    afterwards."""

    policy: Policy

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.policy.name

    @property
    def num_waves(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.policy.num_waves

    def begin_step(self) -> None:
        self.policy.begin_step()

    def begin_forward(self) -> None:
        self.policy.begin_forward()

    def layer_ready(self, layer: int) -> None:
        self.policy.layer_ready(layer)

    def enter_forward(self, layer: int) -> None:
        self.policy.enter_forward(layer)

    def split_forward(self, layer: int, counts_E: list[int], hidden_TH: Tensor, index_Tk: Tensor) -> LayerSplit:
        return self.policy.split_forward(layer, counts_E, hidden_TH, index_Tk)

    def begin_backward(self, counts_LE: dict[int, list[int]], *, is_last: bool) -> None:
        self.policy.begin_backward(counts_LE, is_last=is_last)

    def enter_backward(self, layer: int) -> None:
        self.policy.enter_backward(layer)

    def split_backward(self, layer: int) -> LayerSplit:
        return self.policy.split_backward(layer)

    def leave_backward(self, layer: int) -> None:
        self.policy.leave_backward(layer)

    def next_use(self, key: UnitKey) -> float:
        return self.policy.next_use(key)
