"""Routed experts whose weights sit side by side in slots: each product of all of them is one grouped GEMM.

Legend: ``G`` slots, ``S`` routed pairs sorted by slot, ``H`` hidden size, ``I`` intermediate size, ``P`` width of the
pre-activations (``2I`` for gated experts, else ``I``).

The formulas are those of ``expert_math``. There is no loop over experts, and nothing waits for an accelerator: group
boundaries stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.models.activations import make_activation
from isthmus.models.expert_math import scale_rows
from isthmus.spec.model import ExpertSpec


class GroupedExpertMath:
    """The experts of one layer in a slot buffer. Stateless.

    ``activation_module``: as for ``ExpertMath``. Weights, gradients, inputs and outputs share one dtype and device. On
    CUDA, rows and slots must lie at multiples of 16 bytes (for bf16: H, I and a slot's numel divisible by 8).
    """

    def __init__(self, spec: ExpertSpec, activation_module: nn.Module | None = None) -> None:
        self.spec = spec
        self.activation = make_activation(spec.activation, has_gate=spec.has_gate, module=activation_module)
        self.up_name = "gate_up_proj" if spec.has_gate else "up_proj"
        self.pre_size = spec.intermediate_size * (2 if spec.has_gate else 1)

    def views(self, flat_GF: Tensor) -> dict[str, Tensor]:
        """The slots' tensors, each (G, …), as views of a slot buffer (num_slots, spec.numel)."""
        pieces = flat_GF.split([tensor.numel for tensor in self.spec.tensors], dim=1)
        return {
            tensor.name: piece.unflatten(1, tensor.shape)
            for tensor, piece in zip(self.spec.tensors, pieces, strict=True)
        }

    @torch.no_grad()
    def forward_grouped(
        self, slots: dict[str, Tensor], offsets_G: Tensor, x_SH: Tensor, s_S: Tensor, *, save: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(s * y (S, H), pre-activations (S, P) if ``save``). ``offsets_G``: int32, where each slot's rows end; slots
        without rows are allowed, the last offset is S."""
        pre_SP = self._pre_activations(slots, offsets_G, x_SH)
        act_SI = x_SH.new_empty(x_SH.shape[0], self.spec.intermediate_size)
        self.activation.forward(pre_SP, act_SI)
        out_SH = F.grouped_mm(act_SI, self._down_GIH(slots), offs=offsets_G)
        if self.spec.has_bias:
            out_SH += slots["down_proj_bias"][_slot_of_row(offsets_G, x_SH.shape[0])]
        scale_rows(out_SH, s_S, out_SH)
        return out_SH, pre_SP if save else None

    @torch.no_grad()
    def backward_grouped(
        self,
        slots: dict[str, Tensor],
        offsets_G: Tensor,
        x_SH: Tensor,
        s_S: Tensor,
        g_SH: Tensor,
        saved_SP: Tensor | None,
        gradient_slots: dict[str, Tensor],
        *,
        accumulate: Sequence[bool],
    ) -> tuple[Tensor, Tensor]:
        """(d x (S, H), d s (S,)) for ``g_SH`` = d loss / d (s * y).

        Writes the weight gradients of slot i into ``gradient_slots[name][i]``, or adds them where ``accumulate[i]``.
        Overwrites ``saved_SP``; recomputes it where None.
        """
        num_rows = x_SH.shape[0]
        pre_SP = self._pre_activations(slots, offsets_G, x_SH) if saved_SP is None else saved_SP
        act_SI = x_SH.new_empty(num_rows, self.spec.intermediate_size)
        pullback = self.activation.linearize(pre_SP, act_SI, torch.empty_like(act_SI))
        sg_SH = torch.empty_like(g_SH)
        scale_rows(g_SH, s_S, sg_SH)
        sink = _GradientSink(gradient_slots, offsets_G, accumulate, num_rows)
        self._weight_gradient(sink, "down_proj", act_SI, sg_SH)
        u_SI = F.grouped_mm(g_SH, self._down_GIH(slots).mT, offs=offsets_G)
        ds_S = torch.mul(act_SI, u_SI, out=act_SI).sum(dim=1).to(s_S.dtype)
        if self.spec.has_bias:
            ds_S += (g_SH * slots["down_proj_bias"][_slot_of_row(offsets_G, num_rows)]).sum(dim=1)
        u_SI.mul_(s_S.to(u_SI.dtype).unsqueeze(1))
        dpre_SP = pullback(u_SI, act_SI)
        self._weight_gradient(sink, self.up_name, x_SH, dpre_SP)
        return F.grouped_mm(dpre_SP, self._up_GHP(slots).mT, offs=offsets_G), ds_S

    def _pre_activations(self, slots: dict[str, Tensor], offsets_G: Tensor, x_SH: Tensor) -> Tensor:
        pre_SP = F.grouped_mm(x_SH, self._up_GHP(slots), offs=offsets_G)
        if self.spec.has_bias:
            pre_SP += slots[f"{self.up_name}_bias"][_slot_of_row(offsets_G, x_SH.shape[0])]
        return pre_SP

    def _up_GHP(self, slots: dict[str, Tensor]) -> Tensor:
        return slots[self.up_name] if self.spec.is_transposed else slots[self.up_name].mT

    def _down_GIH(self, slots: dict[str, Tensor]) -> Tensor:
        return slots["down_proj"] if self.spec.is_transposed else slots["down_proj"].mT

    def _weight_gradient(self, sink: _GradientSink, name: str, input_SK: Tensor, gradient_SM: Tensor) -> None:
        """For out (S, M) = in (S, K) W: the gradients of W and of its bias."""
        left, right = (input_SK, gradient_SM) if self.spec.is_transposed else (gradient_SM, input_SK)
        sink.put(name, F.grouped_mm(left.t(), right, offs=sink.offsets_G))
        if self.spec.has_bias:
            # A product with the one-hot matrix of the rows' slots: the same sums on every run, which index_add_ is not.
            sink.put(f"{name}_bias", sink.one_hot_GS(gradient_SM.dtype) @ gradient_SM)


class _GradientSink:
    """Where the slots' weight gradients go, and which of them already hold something."""

    def __init__(
        self, gradient_slots: dict[str, Tensor], offsets_G: Tensor, accumulate: Sequence[bool], num_rows: int
    ) -> None:
        self.gradient_slots = gradient_slots
        self.offsets_G = offsets_G
        self.num_rows = num_rows
        self.adds, self.writes = any(accumulate), not all(accumulate)
        device = offsets_G.device
        self.is_new_G = torch.tensor([not adds for adds in accumulate]).to(device, non_blocking=True)
        begins_G = torch.cat([offsets_G.new_zeros(1), offsets_G[:-1]])
        self.is_empty_G = offsets_G == begins_G

    def one_hot_GS(self, dtype: torch.dtype) -> Tensor:
        slot_S = _slot_of_row(self.offsets_G, self.num_rows)
        return (slot_S == torch.arange(len(self.offsets_G), device=slot_S.device).unsqueeze(1)).to(dtype)

    def put(self, name: str, new: Tensor) -> None:
        def per_slot(mask_G: Tensor) -> Tensor:
            return mask_G.view(-1, *[1] * (new.dim() - 1))

        # What a grouped GEMM leaves behind for a group without rows is not specified.
        new.masked_fill_(per_slot(self.is_empty_G), 0)
        held = self.gradient_slots[name]
        if not self.adds:
            held.copy_(new)
            return
        if self.writes:
            held.masked_fill_(per_slot(self.is_new_G), 0)
        held.add_(new)


def _slot_of_row(offsets_G: Tensor, num_rows: int) -> Tensor:
    rows = torch.arange(num_rows, device=offsets_G.device, dtype=offsets_G.dtype)
    return torch.searchsorted(offsets_G, rows, right=True)
