"""Routed experts whose weights sit in slots of one buffer: each product of all of them is one grouped GEMM.

Legend: ``G`` neighbouring slots, ``E`` those of them whose experts have rows, ``S`` routed pairs sorted by slot, ``H``
hidden size, ``I`` intermediate size, ``P`` width of the pre-activations (``2I`` for gated experts, else ``I``).

The formulas are those of ``expert_math``. A grouped GEMM wants its weights at equal distances, so it runs over a view
of all slots between the first and the last that are wanted: a slot between them without rows is a group without rows,
which is never read and costs next to nothing, where bringing the wanted ones together would copy all of their weights.
Weight gradients have no such view to go to (grouped GEMMs write fresh memory only): they arise side by side for a few
experts at a time and are copied or added to where they belong. Nothing waits for an accelerator: which rows belong to
which slot is known on the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.models.activations import make_activation
from isthmus.models.expert_math import scale_rows
from isthmus.spec.model import ExpertSpec

MOST_SLOTS = 1023
"""Most groups that PyTorch's grouped GEMM takes on a GPU."""
GRADIENT_CHUNK_BYTES = 64 << 20
"""Most bytes of weight gradients on their way to where they belong, unless one tensor of one expert has more."""
_ALIGNED_BYTES = 16
_foreach_copy, _foreach_add = torch._foreach_copy_, torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]


def can_group(
    spec: ExpertSpec, dtype: torch.dtype, *, slot_numel: int, cuda_capability: tuple[int, int] | None
) -> bool:
    """Whether grouped GEMMs do these experts any good. ``cuda_capability`` None: on a CPU.

    PyTorch 2.11 to 2.13 have a kernel for bf16 on compute capability 9 and 10 alone: anywhere else on CUDA grouped_mm
    reads the offsets back to the host and loops over the groups, which is slower than a loop of our own. Rows must be
    multiples of 16 bytes (``grouped_mm`` refuses others), on CUDA every tensor in every slot as well.
    """
    pre_size = spec.intermediate_size * (2 if spec.has_gate else 1)
    multiples = [spec.hidden_size, spec.intermediate_size, pre_size]
    if cuda_capability is not None:
        if dtype != torch.bfloat16 or cuda_capability[0] not in (9, 10):
            return False
        multiples += [slot_numel, *itertools.accumulate(tensor.numel for tensor in spec.tensors)]
    return all(numel * dtype.itemsize % _ALIGNED_BYTES == 0 for numel in multiples)


def gradient_chunk_bytes(spec: ExpertSpec, dtype: torch.dtype) -> int:
    """Most bytes of weight gradients that ``backward_grouped`` holds at a time besides its other temporaries."""
    largest = max(tensor.numel for tensor in spec.tensors) * dtype.itemsize
    return max(largest, min(GRADIENT_CHUNK_BYTES, spec.num_experts * largest))


class GroupedExpertMath:
    """The experts of one layer in a slot buffer. Stateless.

    ``activation_module``: as for ``ExpertMath``. Weights, gradients, inputs and outputs share one dtype and device,
    for which ``can_group`` holds; the pairs' weights ``s`` may have another dtype.
    """

    def __init__(self, spec: ExpertSpec, activation_module: nn.Module | None = None) -> None:
        self.spec = spec
        self.activation = make_activation(spec.activation, has_gate=spec.has_gate, module=activation_module)
        self.up_name = "gate_up_proj" if spec.has_gate else "up_proj"

    def views(self, flat_GF: Tensor) -> dict[str, Tensor]:
        """The slots' tensors, each (G, …), as views of a slot buffer (num_slots, spec.numel)."""
        pieces = flat_GF.split([tensor.numel for tensor in self.spec.tensors], dim=1)
        return {
            tensor.name: piece.unflatten(1, tensor.shape)
            for tensor, piece in zip(self.spec.tensors, pieces, strict=True)
        }

    @torch.no_grad()
    def forward_grouped(
        self, slots: dict[str, Tensor], counts_G: Sequence[int], x_SH: Tensor, s_S: Tensor, out_SH: Tensor
    ) -> None:
        """Writes s * y (S, H) into ``out_SH``. ``counts_G``: each slot's rows, which add up to S; zeros are allowed."""
        offsets_G = offsets(counts_G, x_SH.device)
        pre_SP = self._pre_activations(slots, offsets_G, x_SH)
        act_SI = x_SH.new_empty(x_SH.shape[0], self.spec.intermediate_size)
        self.activation.forward(pre_SP, act_SI)
        y_SH = F.grouped_mm(act_SI, self._down_GIH(slots), offs=offsets_G)
        if self.spec.has_bias:
            y_SH += _of_rows(slots["down_proj_bias"], offsets_G, y_SH)
        scale_rows(y_SH, s_S, out_SH)

    @torch.no_grad()
    def backward_grouped(
        self,
        slots: dict[str, Tensor],
        counts_G: Sequence[int],
        x_SH: Tensor,
        s_S: Tensor,
        g_SH: Tensor,
        gradients: Sequence[dict[str, Tensor]],
        *,
        accumulate: Sequence[bool],
        dx_SH: Tensor,
    ) -> Tensor:
        """d s (S,) for ``g_SH`` = d loss / d (s * y). Writes d x into ``dx_SH`` (S, H).

        Writes the weight gradients of the i-th slot that has rows into ``gradients[i]``, or adds them where
        ``accumulate[i]``. Recomputes the pre-activations.
        """
        offsets_G = offsets(counts_G, x_SH.device)
        pre_SP = self._pre_activations(slots, offsets_G, x_SH)
        act_SI = x_SH.new_empty(x_SH.shape[0], self.spec.intermediate_size)
        pullback = self.activation.linearize(pre_SP, act_SI, torch.empty_like(act_SI))
        sink = _GradientSink(self.spec, [count for count in counts_G if count], gradients, accumulate)
        sg_SH = torch.empty_like(g_SH)
        scale_rows(g_SH, s_S, sg_SH)
        sink.take("down_proj", act_SI, sg_SH)
        del sg_SH
        u_SI = F.grouped_mm(g_SH, self._down_GIH(slots).mT, offs=offsets_G)
        ds_S = torch.mul(act_SI, u_SI, out=act_SI).sum(dim=1).to(s_S.dtype)
        if self.spec.has_bias:
            ds_S += _of_rows(slots["down_proj_bias"], offsets_G, g_SH).mul_(g_SH).sum(dim=1)
        u_SI.mul_(s_S.to(u_SI.dtype).unsqueeze(1))
        dpre_SP = pullback(u_SI, act_SI)
        sink.take(self.up_name, x_SH, dpre_SP)
        dx_SH.copy_(F.grouped_mm(dpre_SP, self._up_GHP(slots).mT, offs=offsets_G))
        return ds_S

    def _pre_activations(self, slots: dict[str, Tensor], offsets_G: Tensor, x_SH: Tensor) -> Tensor:
        pre_SP = F.grouped_mm(x_SH, self._up_GHP(slots), offs=offsets_G)
        if self.spec.has_bias:
            pre_SP += _of_rows(slots[f"{self.up_name}_bias"], offsets_G, pre_SP)
        return pre_SP

    def _up_GHP(self, slots: dict[str, Tensor]) -> Tensor:
        return slots[self.up_name] if self.spec.is_transposed else slots[self.up_name].mT

    def _down_GIH(self, slots: dict[str, Tensor]) -> Tensor:
        return slots["down_proj"] if self.spec.is_transposed else slots["down_proj"].mT


class _GradientSink:
    """Where weight gradients go, and which of them already hold something."""

    def __init__(
        self,
        spec: ExpertSpec,
        counts_E: list[int],
        gradients: Sequence[dict[str, Tensor]],
        accumulate: Sequence[bool],
    ) -> None:
        self.spec = spec
        self.counts_E = counts_E
        self.gradients = gradients
        self.accumulate = accumulate

    def take(self, name: str, input_SK: Tensor, gradient_SM: Tensor) -> None:
        """For out (S, M) = in (S, K) W: the gradients of W and of its bias, a chunk of experts after the other."""
        left, right = (input_SK, gradient_SM) if self.spec.is_transposed else (gradient_SM, input_SK)
        expert_bytes = input_SK.shape[1] * gradient_SM.shape[1] * input_SK.element_size()
        most, bounds = max(1, GRADIENT_CHUNK_BYTES // expert_bytes), [0, *itertools.accumulate(self.counts_E)]
        for first, last in itertools.pairwise([*range(0, len(self.counts_E), most), len(self.counts_E)]):
            rows, experts = slice(bounds[first], bounds[last]), slice(first, last)
            offsets_E = offsets(self.counts_E[experts], left.device)
            self._put(name, experts, F.grouped_mm(left[rows].t(), right[rows], offs=offsets_E))
            if self.spec.has_bias:
                # A product with the one-hot matrix of the rows' experts: the same sums on every run, unlike index_add_.
                one_hot_ES = _group_of_row(offsets_E, rows.stop - rows.start) == torch.arange(
                    last - first, device=left.device
                ).unsqueeze(1)
                self._put(f"{name}_bias", experts, one_hot_ES.to(gradient_SM.dtype) @ gradient_SM[rows])

    def _put(self, name: str, experts: slice, new: Tensor) -> None:
        """Copies or adds ``new`` (experts, …), each expert's part to its place, in one or two kernels."""
        pairs = [(gradient[name], part) for gradient, part in zip(self.gradients[experts], new, strict=True)]
        for adds, put in ((False, _foreach_copy), (True, _foreach_add)):
            chosen = [pair for pair, is_sum in zip(pairs, self.accumulate[experts], strict=True) if is_sum == adds]
            if chosen:
                put([place for place, _ in chosen], [part for _, part in chosen])


def offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    """Where each group's rows end, int32. From pageable memory: the driver takes the values before the call returns, so
    that neither side waits for the other."""
    return torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32).to(device, non_blocking=True)


def _group_of_row(offsets_G: Tensor, num_rows: int) -> Tensor:
    rows = torch.arange(num_rows, device=offsets_G.device, dtype=offsets_G.dtype)
    return torch.searchsorted(offsets_G, rows, right=True)


def _of_rows(bias_GM: Tensor, offsets_G: Tensor, rows_SM: Tensor) -> Tensor:
    """The bias (S, M) of each row's slot."""
    return bias_GM[_group_of_row(offsets_G, rows_SM.shape[0])]
