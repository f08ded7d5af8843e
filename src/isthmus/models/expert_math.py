"""Forward and backward of routed experts without autograd: one chain of GEMMs for each expert, nothing copied between.

Legend: ``S`` routed pairs sorted by expert, ``N`` rows of one expert or of a few neighbours, ``H`` hidden size, ``I``
intermediate size, ``P`` width of the pre-activations (``2I`` for gated experts, else ``I``).

With g = d loss / d (s * y) for y = act W_down^T, backward needs neither y nor anything else but the inputs:
u = g W_down, d s = <act, u>, d act = s * u, d W_down = (s * g)^T act, d pre = act'(pre) d act, d W_up = d pre^T x,
d x = d pre W_up. The elementwise parts run once for a chunk of neighbouring experts.

Nobody waits for weight gradients before the step's end, and they need no weights: ``backward_inputs`` leaves them as
``WeightWork``, for whenever there is nothing more urgent (as in zero-bubble pipelines, Qi et al., ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from isthmus.models.activations import make_activation
from isthmus.spec.model import ExpertSpec

CHUNK_BYTES = 1 << 20
"""Most bytes of pre-activations of a chunk of several experts: many small experts share the cost of an operator, and
what a GEMM wrote is still in cache when the next operator reads it."""
CHUNK_WEIGHT_BYTES = 16 << 20
"""Most bytes of weights of such a chunk where backward reads W_up twice: the second time it should be in cache."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Neighbouring experts (their positions), the rows of each, and where these lie among all rows."""

    experts: range
    counts: list[int]
    rows: slice

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass(frozen=True, slots=True)
class _Scratch:
    """Buffers of one call, used for chunk after chunk: fresh memory costs page faults."""

    pre: Tensor
    act: Tensor
    sg: Tensor
    inner: Tensor
    u: Tensor
    spare: Tensor

    @classmethod
    def of(cls, spec: ExpertSpec, pre_size: int, num_rows: int, like: Tensor) -> _Scratch:
        wide = spec.intermediate_size
        widths = (pre_size, wide, spec.hidden_size, wide, wide, wide)
        return cls(*(like.new_empty(num_rows, width) for width in widths))

    def rows(self, num_rows: int) -> _Scratch:
        buffers = (self.pre, self.act, self.sg, self.inner, self.u, self.spare)
        return _Scratch(*(buffer[:num_rows] for buffer in buffers))

    def keeping(self, kept: WeightRows, rows: slice) -> _Scratch:
        """With what the weight gradients need in ``kept``."""
        return replace(self, pre=kept.pre_SP[rows], act=kept.act_SI[rows], sg=kept.sg_SH[rows])


@dataclass(frozen=True, slots=True)
class WeightRows:
    """Buffers that hold what the weight gradients of ``S`` rows need beside the inputs, until they are computed."""

    pre_SP: Tensor
    act_SI: Tensor
    sg_SH: Tensor


@dataclass(frozen=True, slots=True)
class WeightWork:
    """The weight gradients of one expert, yet to be computed, from its rows (N, …)."""

    x_NH: Tensor
    act_NI: Tensor
    sg_NH: Tensor
    dpre_NP: Tensor


@dataclass(frozen=True, slots=True)
class _Rows:
    """What goes into a backward pass and what comes out, whole and by expert."""

    s_S: Tensor
    g_SH: Tensor
    ds_S: Tensor
    x_parts: Sequence[Tensor]
    g_parts: Sequence[Tensor]
    dx_parts: Sequence[Tensor]
    ds_parts: Sequence[Tensor]

    @classmethod
    def of(cls, counts: Sequence[int], x_SH: Tensor, s_S: Tensor, g_SH: Tensor, dx_SH: Tensor) -> _Rows:
        sizes, ds_S = list(counts), torch.empty_like(s_S)
        return cls(s_S, g_SH, ds_S, x_SH.split(sizes), g_SH.split(sizes), dx_SH.split(sizes), ds_S.split(sizes))


class ExpertMath:
    """The experts of one layer. Stateless: safe to call from several threads at once.

    ``activation_module``: the experts module; needed only where ``spec.activation`` is ``module``. Weights, gradients,
    inputs and outputs share one dtype (FP32 or bf16) and device; the pairs' weights ``s`` may have another dtype.
    """

    def __init__(self, spec: ExpertSpec, activation_module: nn.Module | None = None) -> None:
        self.spec = spec
        self.activation = make_activation(spec.activation, has_gate=spec.has_gate, module=activation_module)
        self.up_name = "gate_up_proj" if spec.has_gate else "up_proj"
        self.pre_size = spec.intermediate_size * (2 if spec.has_gate else 1)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """One expert's tensors as views of its contiguous range ``flat``, shape (spec.numel,)."""
        pieces = flat.split([tensor.numel for tensor in self.spec.tensors])
        return {tensor.name: piece.view(tensor.shape) for tensor, piece in zip(self.spec.tensors, pieces, strict=True)}

    def forward(
        self, weights: dict[str, Tensor], x_NH: Tensor, s_N: Tensor, *, save: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``forward_many`` for one expert: (s * y, pre-activations or None)."""
        out_NH, saved = self.forward_many([weights], [x_NH.shape[0]], x_NH, s_N, save=save)
        return out_NH, saved[0] if saved is not None else None

    def backward(
        self,
        weights: dict[str, Tensor],
        x_NH: Tensor,
        s_N: Tensor,
        g_NH: Tensor,
        saved: Tensor | None,
        gradients: dict[str, Tensor],
        *,
        accumulate: bool,
    ) -> tuple[Tensor, Tensor]:
        """``backward_many`` for one expert."""
        return self.backward_many(
            [weights], [x_NH.shape[0]], x_NH, s_N, g_NH, [saved], [gradients], accumulate=[accumulate]
        )

    @torch.no_grad()
    def forward_many(
        self,
        weights: Sequence[dict[str, Tensor]],
        counts: Sequence[int],
        x_SH: Tensor,
        s_S: Tensor,
        *,
        save: bool,
        out_SH: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor] | None]:
        """(s * y (S, H), each expert's pre-activations (N, P) if ``save``). ``counts``: rows of each expert, or zero.

        Writes into ``out_SH`` (contiguous) where given. Raises ``ValueError`` where the rows do not fit ``counts``.
        """
        self._check(weights, counts, x_SH, s_S)
        out_SH = torch.empty_like(x_SH) if out_SH is None else out_SH
        chunks = list(self._chunks(counts, x_SH.dtype, recomputes=False))
        longest = max((chunk.num_rows for chunk in chunks), default=0)
        pre_rows = x_SH.new_empty(x_SH.shape[0] if save else longest, self.pre_size)
        act_rows = x_SH.new_empty(longest, self.spec.intermediate_size)
        sizes = list(counts)
        x_parts, out_parts = x_SH.split(sizes), out_SH.split(sizes)
        for chunk in chunks:
            pre_NP = pre_rows[chunk.rows] if save else pre_rows[: chunk.num_rows]
            act_NI = act_rows[: chunk.num_rows]
            self._pre_activations(chunk, weights, x_parts, pre_NP)
            self.activation.forward(pre_NP, act_NI)
            for expert, act in zip(chunk.experts, act_NI.split(chunk.counts), strict=True):
                _linear(act, self._down_IH(weights[expert]), weights[expert].get("down_proj_bias"), out_parts[expert])
            out_NH = out_SH[chunk.rows]
            scale_rows(out_NH, s_S[chunk.rows], out_NH)
        return out_SH, list(pre_rows.split(sizes)) if save else None

    @torch.no_grad()
    def backward_many(
        self,
        weights: Sequence[dict[str, Tensor]],
        counts: Sequence[int],
        x_SH: Tensor,
        s_S: Tensor,
        g_SH: Tensor,
        saved: Sequence[Tensor | None] | None,
        gradients: Sequence[dict[str, Tensor]],
        *,
        accumulate: Sequence[bool],
        dx_SH: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(d x (S, H), d s (S,)) for ``g_SH`` = d loss / d (s * y), one row per pair.

        Writes each expert's weight gradients into ``gradients``, or adds them where ``accumulate``. Overwrites what is
        ``saved``, recomputes what is None there. Writes into ``dx_SH`` (contiguous) where given. Raises ``ValueError``
        where the rows do not fit ``counts``.
        """
        self._check(weights, counts, x_SH, s_S)
        dx_SH = torch.empty_like(x_SH) if dx_SH is None else dx_SH
        recomputes = saved is None or any(pre is None for pre in saved)
        chunks, scratch = self._chunks_backward(counts, x_SH, recomputes=recomputes)
        rows = _Rows.of(counts, x_SH, s_S, g_SH, dx_SH)
        for chunk in chunks:
            for expert, work in self._input_gradients(chunk, weights, rows, saved, scratch.rows(chunk.num_rows)):
                self.weight_gradients(work, gradients[expert], accumulate=accumulate[expert])
        return dx_SH, rows.ds_S

    @torch.no_grad()
    def backward_inputs(
        self,
        weights: Sequence[dict[str, Tensor]],
        counts: Sequence[int],
        x_SH: Tensor,
        s_S: Tensor,
        g_SH: Tensor,
        kept: WeightRows,
        *,
        dx_SH: Tensor,
    ) -> tuple[Tensor, list[WeightWork]]:
        """(d s (S,), each expert's ``WeightWork``); writes d x into ``dx_SH``. Otherwise as ``backward_many``.

        The work refers to ``x_SH`` and ``kept``: leave them alone until it is done.
        """
        self._check(weights, counts, x_SH, s_S)
        chunks, scratch = self._chunks_backward(counts, x_SH, recomputes=True)
        rows = _Rows.of(counts, x_SH, s_S, g_SH, dx_SH)
        works: list[WeightWork] = []
        for chunk in chunks:
            buffers = scratch.rows(chunk.num_rows).keeping(kept, chunk.rows)
            works += [work for _, work in self._input_gradients(chunk, weights, rows, None, buffers)]
        return rows.ds_S, works

    @torch.no_grad()
    def weight_gradients(self, work: WeightWork, gradients: dict[str, Tensor], *, accumulate: bool) -> None:
        """Writes one expert's weight gradients into ``gradients``, or adds them."""
        self._weight_gradient("down_proj", work.act_NI, work.sg_NH, gradients, accumulate)
        self._weight_gradient(self.up_name, work.x_NH, work.dpre_NP, gradients, accumulate)

    def weight_rows(self, num_rows: int, take: Callable[[tuple[int, int]], Tensor]) -> WeightRows:
        """Buffers for ``backward_inputs``, from ``take(shape)``."""
        widths = (self.pre_size, self.spec.intermediate_size, self.spec.hidden_size)
        return WeightRows(*(take((num_rows, width)) for width in widths))

    def _input_gradients(
        self,
        chunk: _Chunk,
        weights: Sequence[dict[str, Tensor]],
        rows: _Rows,
        saved: Sequence[Tensor | None] | None,
        buffers: _Scratch,
    ) -> Iterator[tuple[int, WeightWork]]:
        """Computes d x and d s of the chunk's rows, then yields (expert, its weight gradients to be computed)."""
        pre_NP = self._restore(chunk, weights, rows.x_parts, saved, buffers.pre)
        pullback = self.activation.linearize(pre_NP, buffers.act, buffers.inner)
        s_N = rows.s_S[chunk.rows]
        scale_rows(rows.g_SH[chunk.rows], s_N, buffers.sg)
        for expert, u in zip(chunk.experts, buffers.u.split(chunk.counts), strict=True):
            torch.mm(rows.g_parts[expert], self._down_IH(weights[expert]).t(), out=u)
        rows.ds_S[chunk.rows] = torch.mul(buffers.act, buffers.u, out=buffers.spare).sum(dim=1)
        if self.spec.has_bias:
            for expert in chunk.experts:
                rows.ds_parts[expert].add_(torch.mv(rows.g_parts[expert], weights[expert]["down_proj_bias"]))
        buffers.u.mul_(s_N.to(buffers.u.dtype).unsqueeze(1))
        dpre_NP = pullback(buffers.u, buffers.spare)
        pieces = (rows_N.split(chunk.counts) for rows_N in (dpre_NP, buffers.act, buffers.sg))
        for expert, dpre, act, sg in zip(chunk.experts, *pieces, strict=True):
            torch.mm(dpre, self._up_HP(weights[expert]).t(), out=rows.dx_parts[expert])
            yield expert, WeightWork(rows.x_parts[expert], act, sg, dpre)

    def _pre_activations(
        self, chunk: _Chunk, weights: Sequence[dict[str, Tensor]], x_parts: Sequence[Tensor], pre_NP: Tensor
    ) -> None:
        for expert, pre in zip(chunk.experts, pre_NP.split(chunk.counts), strict=True):
            weight = weights[expert]
            _linear(x_parts[expert], self._up_HP(weight), weight.get(f"{self.up_name}_bias"), pre)

    def _restore(
        self,
        chunk: _Chunk,
        weights: Sequence[dict[str, Tensor]],
        x_parts: Sequence[Tensor],
        saved: Sequence[Tensor | None] | None,
        scratch_NP: Tensor,
    ) -> Tensor:
        """The chunk's pre-activations: those that forward saved, else computed again into ``scratch_NP``."""
        kept = [pre for pre in (saved[expert] for expert in chunk.experts) if pre is not None] if saved else []
        if len(kept) < len(chunk.experts):
            self._pre_activations(chunk, weights, x_parts, scratch_NP)
            return scratch_NP
        return kept[0] if len(kept) == 1 else torch.cat(kept, out=scratch_NP)

    def _chunks_backward(
        self, counts: Sequence[int], x_SH: Tensor, *, recomputes: bool
    ) -> tuple[list[_Chunk], _Scratch]:
        """The chunks, and buffers for the longest."""
        chunks = list(self._chunks(counts, x_SH.dtype, recomputes=recomputes))
        longest = max((chunk.num_rows for chunk in chunks), default=0)
        return chunks, _Scratch.of(self.spec, self.pre_size, longest, x_SH)

    def _chunks(self, counts: Sequence[int], dtype: torch.dtype, *, recomputes: bool) -> Iterator[_Chunk]:
        """Cuts the experts into runs of neighbours, one expert or within the bounds on a chunk's bytes."""
        most_rows = CHUNK_BYTES // (self.pre_size * dtype.itemsize)
        most_experts = CHUNK_WEIGHT_BYTES // (self.spec.numel * dtype.itemsize) if recomputes else len(counts)
        cuts, num_rows = [0], 0
        for expert, count in enumerate(counts):
            num_experts = expert - cuts[-1]
            if num_experts and (num_rows + count > most_rows or num_experts >= most_experts):
                cuts.append(expert)
                num_rows = 0
            num_rows += count
        start = 0
        for first, last in pairwise([*cuts, len(counts)]):
            stop = start + sum(counts[first:last])
            yield _Chunk(range(first, last), list(counts[first:last]), slice(start, stop))
            start = stop

    def _up_HP(self, weights: dict[str, Tensor]) -> Tensor:
        weight = weights[self.up_name]
        return weight if self.spec.is_transposed else weight.t()

    def _down_IH(self, weights: dict[str, Tensor]) -> Tensor:
        weight = weights["down_proj"]
        return weight if self.spec.is_transposed else weight.t()

    def _weight_gradient(
        self, name: str, input_NK: Tensor, gradient_NM: Tensor, gradients: dict[str, Tensor], accumulate: bool
    ) -> None:
        """For out (N, M) = in (N, K) W: the gradients of W and of its bias."""
        left, right = (input_NK, gradient_NM) if self.spec.is_transposed else (gradient_NM, input_NK)
        if accumulate:
            gradients[name].addmm_(left.t(), right)
        else:
            torch.mm(left.t(), right, out=gradients[name])
        if self.spec.has_bias:
            bias_gradient = gradients[f"{name}_bias"]
            if accumulate:
                bias_gradient += gradient_NM.sum(dim=0)
            else:
                torch.sum(gradient_NM, dim=0, out=bias_gradient)

    def _check(self, weights: Sequence[dict[str, Tensor]], counts: Sequence[int], x_SH: Tensor, s_S: Tensor) -> None:
        if len(weights) != len(counts) or sum(counts) != x_SH.shape[0] or s_S.shape != x_SH.shape[:1]:
            raise ValueError(
                f"counts: got {len(counts)} counts that add up to {sum(counts)}, wanted one for each of {len(weights)} "
                f"experts, adding up to the rows of x_SH {tuple(x_SH.shape)} and of s_S {tuple(s_S.shape)}"
            )


def scale_rows(rows_NH: Tensor, s_N: Tensor, out_NH: Tensor) -> None:
    """``out = s * rows``, rounded once. ``out_NH`` may be ``rows_NH``; ``s_N`` may have a wider dtype."""
    if s_N.dtype == rows_NH.dtype:
        torch.mul(rows_NH, s_N.unsqueeze(1), out=out_NH)
    else:
        # On CPUs an operator of mixed dtypes takes several times as long as the cast, the product and the cast back.
        out_NH.copy_(rows_NH.to(s_N.dtype).mul_(s_N.unsqueeze(1)))


def _linear(x_NK: Tensor, weight_KM: Tensor, bias_M: Tensor | None, out_NM: Tensor) -> None:
    if bias_M is None:
        torch.mm(x_NK, weight_KM, out=out_NM)
    else:
        torch.addmm(bias_M, x_NK, weight_KM, out=out_NM)
