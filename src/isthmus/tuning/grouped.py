"""Experts that are on the accelerator already, computed at once: one grouped GEMM for each product of all of them.

The rows of a pass are sorted once, when it is made, and grouped GEMMs want them in the order of their slots. So experts
that have landed by then come first, by slot; what is still there in this order when they are computed is a *run*,
acquired whole and without waiting. What lands later is computed expert by expert, as the link brings it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from isthmus.models.expert_math_grouped import MOST_SLOTS, GroupedExpertMath, can_group, gradient_chunk_bytes
from isthmus.models.moe_model import MoeModel
from isthmus.models.skeleton import torch_dtype
from isthmus.spec.model import UnitKey
from isthmus.tuning.accelerator.base import Accelerator
from isthmus.tuning.loader import ExpertLoader


def should_group(model: MoeModel, accelerator: Accelerator) -> bool:
    """Whether to group this model's experts: on CUDA devices with a kernel for it, and in no other place."""
    if accelerator.device.type != "cuda" or torch.version.hip is not None:
        return False
    capability, dtype = torch.cuda.get_device_capability(accelerator.device), torch_dtype(model.dtype)
    return all(
        can_group(parts.spec, dtype, slot_numel=model.slot_numel, cuda_capability=capability)
        for parts in model.moe_parts.values()
    )


def scratch_bytes(model: MoeModel) -> int:
    """Accelerator bytes that groups need beyond what single experts do: gradients on their way to their slots."""
    dtype = torch_dtype(model.dtype)
    return max(gradient_chunk_bytes(parts.spec, dtype) for parts in model.moe_parts.values())


@dataclass(frozen=True, slots=True)
class Run:
    """Experts that are acquired, in ascending slots, and the number of rows of each."""

    experts: list[int]
    slots: list[int]
    counts: list[int]


class GroupedExperts:
    """The experts of all layers in the loader's slots. Belongs to the computing thread."""

    def __init__(self, loader: ExpertLoader, experts: dict[int, GroupedExpertMath]) -> None:
        self.loader = loader
        self._experts = experts

    @classmethod
    def of(cls, model: MoeModel, loader: ExpertLoader) -> Self:
        parts = model.moe_parts
        return cls(loader, {layer: GroupedExpertMath(parts[layer].spec, model.experts[layer]) for layer in parts})

    def in_slot_order(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Experts that have landed, by slot, then the others as they come."""
        slots = self.loader.landed_slots([UnitKey(layer, expert) for expert in experts])
        in_order = sorted(zip(slots, experts, strict=True), key=lambda pair: math.inf if pair[0] is None else pair[0])
        return [expert for _, expert in in_order]

    def runs(
        self, layer: int, experts: Sequence[int], counts_E: Sequence[int], *, takes_slot: Sequence[bool] | None = None
    ) -> Iterator[Run]:
        """Acquires run after run of ``experts``, in their order, each until the next is asked for; passes over experts
        that have not landed. Never blocks.

        ``takes_slot``: which of them the caller takes a slot for while it has the run, and keeps; a run is never longer
        than leaves enough of them to be had.
        """
        keys = [UnitKey(layer, expert) for expert in experts]
        num_slots = [1 + takes for takes in takes_slot] if takes_slot is not None else [1] * len(keys)
        room = self.loader.num_unheld
        at = 0
        while at < len(keys):
            slots = self.loader.acquire_run(keys[at : at + _fitting(num_slots[at:], room)], most_slots=MOST_SLOTS)
            end = at + len(slots)
            if slots:
                chosen = list(experts[at:end])
                try:
                    yield Run(chosen, slots, [counts_E[expert] for expert in chosen])
                finally:
                    self.loader.release(*keys[at:end])
            room -= sum(num_slots[at:end]) - len(slots)
            at = max(end, at + 1)

    def weights(self, layer: int, run: Run) -> list[Tensor]:
        """The weights (numel,) of each expert of the run."""
        return [self.loader.buffer[slot, : self._experts[layer].spec.numel] for slot in run.slots]

    def forward(self, layer: int, run: Run, x_SH: Tensor, s_S: Tensor, out_SH: Tensor) -> None:
        """``GroupedExpertMath.forward_grouped`` on the run's rows."""
        self._experts[layer].forward_grouped(*self._slots(layer, run), x_SH, s_S, out_SH)

    def backward(
        self,
        layer: int,
        run: Run,
        x_SH: Tensor,
        s_S: Tensor,
        g_SH: Tensor,
        gradients: Sequence[dict[str, Tensor]],
        *,
        accumulate: Sequence[bool],
        dx_SH: Tensor,
    ) -> Tensor:
        """``GroupedExpertMath.backward_grouped`` on the run's rows."""
        slots, counts_G = self._slots(layer, run)
        return self._experts[layer].backward_grouped(
            slots, counts_G, x_SH, s_S, g_SH, gradients, accumulate=accumulate, dx_SH=dx_SH
        )

    def _slots(self, layer: int, run: Run) -> tuple[dict[str, Tensor], list[int]]:
        """The tensors of all slots between the run's first and its last, and the rows of each."""
        experts, first, last = self._experts[layer], run.slots[0], run.slots[-1]
        counts_G = [0] * (last - first + 1)
        for slot, count in zip(run.slots, run.counts, strict=True):
            counts_G[slot - first] = count
        return experts.views(self.loader.buffer[first : last + 1, : experts.spec.numel]), counts_G


def _fitting(sizes: Sequence[int], room: int) -> int:
    """How many of the first fit."""
    for number, size in enumerate(sizes):
        room -= size
        if room < 0:
            return number
    return len(sizes)
