"""The arithmetic of a decoupled layer: all sub-blocks that live on one device in one batched GEMM a matrix.

A decoupled layer has the tensors of the layer it replaces, shape by shape (DeTransformer, DATE 2024, section III: the
parameter counts are equal); only what multiplies what differs. A matrix that reads hidden units (q, k, v, gate, up) is
cut along its inputs, one that writes them (o, down) along its outputs, norms along their units. Biases of what is read
into (q, k, v, up) are shared by all sub-blocks, which is what keeps the counts equal.

Shapes: B batch, T tokens, M = B·T, N sub-blocks, n of them side by side with the same width w, H hidden units, O
outputs of a matrix (heads times head size, or the MLP's width), D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Parts = list[Tensor]
"""A hidden state as runs of equally wide slices: (n, M, w) each."""


@dataclass(frozen=True)
class Slices:
    """The widths of all slices, and as ``runs`` (first hidden unit, number, width) of neighbours of one width."""

    widths: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        runs, start = [], 0
        for width, same in groupby(self.widths):
            num = len(list(same))
            runs.append((start, num, width))
            start += num * width
        object.__setattr__(self, "runs", tuple(runs))

    @property
    def num(self) -> int:
        return len(self.widths)

    def split(self, hidden_BTH: Tensor) -> Parts:
        """Views of each run's slices."""
        flat_MH = hidden_BTH.flatten(0, -2)
        return [
            _part(flat_MH, 1, start, num * width).unflatten(1, (num, width)).transpose(0, 1)
            for start, num, width in self.runs
        ]

    def join(self, parts: Parts, shape: torch.Size) -> Tensor:
        """The hidden state again, of ``shape`` (B, T, H)."""
        flat = [part.transpose(0, 1).flatten(1) for part in parts]
        return (flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)).view(shape)

    def read(self, parts: Parts, weight_OH: Tensor, bias_O: Tensor | None) -> Tensor:
        """Every sub-block's product of its slice with its columns of the matrix: (N, M, O).

        A matrix (O, w), of sub-blocks that have heads of their own, is cut along its outputs instead: (N, M, O / N).
        """
        is_own = weight_OH.shape[1] != sum(self.widths)
        outputs = []
        for part, (start, num, width) in zip(parts, self.runs, strict=True):
            if is_own:
                weight = weight_OH.unflatten(0, (num, -1)).transpose(1, 2)
                bias = None if bias_O is None else bias_O.view(num, 1, -1)
            else:
                weight = _part(weight_OH, 1, start, num * width).unflatten(1, (num, width)).permute(1, 2, 0)
                bias = bias_O
            outputs.append(torch.bmm(part, weight) if bias is None else torch.baddbmm(bias, part, weight))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def write(self, inner_NMO: Tensor, weight_HO: Tensor, bias_H: Tensor | None) -> Parts:
        """Every sub-block's product with its rows of the matrix, which are its slice."""
        parts, first = [], 0
        for start, num, width in self.runs:
            weight = _part(weight_HO, 0, start, num * width).unflatten(0, (num, width)).transpose(1, 2)
            inner = _part(inner_NMO, 0, first, num)
            if bias_H is None:
                parts.append(torch.bmm(inner, weight))
            else:
                bias = _part(bias_H, 0, start, num * width).view(num, 1, width)
                parts.append(torch.baddbmm(bias, inner, weight))
            first += num
        return parts

    def norm(self, parts: Parts, norm: nn.Module) -> Parts:
        """LayerNorm or RMSNorm over each slice by itself, with its part of the norm's weights."""
        weight_H, bias_H = norm.weight, getattr(norm, "bias", None)
        outputs = []
        for part, (start, num, width) in zip(parts, self.runs, strict=True):
            units = slice(start, start + num * width)
            if isinstance(norm, nn.LayerNorm):
                normed = F.layer_norm(part, (width,), eps=norm.eps)
            else:
                normed = F.rms_norm(part, (width,), eps=float(norm.variance_epsilon))  # type: ignore[arg-type]
            weight = weight_H[units].view(num, 1, width)  # type: ignore[index]
            bias = None if bias_H is None else bias_H[units].view(num, 1, width)
            outputs.append(normed * weight if bias is None else torch.addcmul(bias, normed, weight))
        return outputs


def _part(tensor: Tensor, dim: int, start: int, size: int) -> Tensor:
    """``tensor.narrow``; where that is all of it the tensor itself, whose gradient takes no copy."""
    return tensor if size == tensor.shape[dim] else tensor.narrow(dim, start, size)


def add(left: Parts, right: Parts, dropout: Callable[[Tensor], Tensor]) -> Parts:
    """The residual connection: ``left`` + what ``dropout`` leaves of ``right``."""
    return [a + dropout(b) for a, b in zip(left, right, strict=True)]


def attend(
    module: nn.Module,
    queries_keys_values: Sequence[Tensor],
    *,
    batch: Sequence[int],
    head_size: int,
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    attention_mask: Tensor | None,
    cache: Any,
    dropout: float,
    eager: Callable[..., Any],
    **kwargs: Any,
) -> Tensor:
    """Attention of every sub-block over its own heads; ``queries_keys_values`` (N, M, ·) each, returns (N, M, O).

    ``module`` is the original attention, asked for its ``config``, ``layer_idx``, ``scaling`` and ``is_causal``.
    Without a cache the sub-blocks are so many more rows of the batch, which needs no copies; with one (``Cache``) so
    many more heads, so that what acts on the cache's rows, such as beam search, sees one row a sequence.
    """
    num_sub_blocks, num_rows = queries_keys_values[0].shape[0], batch[0]

    def heads(rows_NMO: Tensor) -> Tensor:
        shape = (num_sub_blocks, *batch, -1, head_size)
        if cache is None:
            return rows_NMO.view(shape).flatten(0, 1).transpose(1, 2)
        return rows_NMO.view(shape).permute(1, 0, 3, 2, 4).flatten(1, 2)

    query, key, value = (heads(rows) for rows in queries_keys_values)
    if rotate is not None:
        query, key = rotate(query, key)
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    elif attention_mask is not None and attention_mask.shape[0] == num_rows > 1:
        attention_mask = attention_mask.repeat(num_sub_blocks, *[1] * (attention_mask.dim() - 1))
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)  # type: ignore[union-attr]
    context, _ = interface(module, query, key, value, attention_mask, dropout=dropout, scaling=module.scaling, **kwargs)
    if cache is None:
        return context.reshape(num_sub_blocks, batch[0] * batch[1], -1)
    return (
        context.unflatten(2, (num_sub_blocks, -1))
        .permute(2, 0, 1, 3, 4)
        .reshape(num_sub_blocks, batch[0] * batch[1], -1)
    )
