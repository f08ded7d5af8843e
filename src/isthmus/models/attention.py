"""Softmax attention on a CPU as blocks of plain GEMMs: the fast path of models whose attention runs in host memory.

PyTorch's fused attention walks rows with small kernels of its own on a CPU: forward and backward take about twice the
time in bf16, and 1.4 times in FP32, of the same arithmetic given to the GEMM library a block of queries at a time. In
long sequences, as in FlashAttention (Dao et al. 2022, algorithms 1 and 4), no more than one block of probabilities
exists at a time and backward computes it again; unlike there a block spans all its keys, so the softmax needs no
running maximum.

Shapes: B batch, H query heads, G key/value heads, R = H / G, Q queries, K keys, D size of a query's and key's head, V
of a value's. C queries make a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "isthmus_blocked"
"""Under this name transformers finds ``attention_forward``."""
BLOCK_QUERIES = 64
"""With 32 to 128 a block's scores stay in a core's cache and its GEMMs are large enough; measured for D = 64."""
KEEP_UP_TO_KEYS = 1024
"""Up to here probabilities are kept for backward, whose time that cuts by a third: what they take, half of H·K values a
token, is then of the order of what else a layer keeps. Beyond, they are computed again."""


def use_blocked_attention(model: PreTrainedModel) -> None:
    """From now on ``model`` computes with ``attention_forward`` what it computed with PyTorch's fused attention.

    Models with another attention (gpt-oss and its sinks, NLLB-MoE) are left as they are.
    """
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention_forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' ``sdpa_attention_forward`` computes, with the same arguments; (B, Q, H, V).

    ``query`` (B, H, Q, D), ``key`` (B, G, K, D), ``value`` (B, G, K, V), ``attention_mask`` None or bool
    (B or 1, 1, Q, K). A query that may see no key gets some finite value. What this path does not know (dropout,
    additive masks, a bias per position, a cache longer than the queries without a mask, tensors on ``meta``, whose
    masks say nothing) goes to PyTorch.
    """
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    known = (
        dropout == 0
        and not query.is_meta
        and not any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache", "s_aux"))
        and (attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1))
        and (not causal or query.shape[2] == key.shape[2])
    )
    if not known:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    # Under autocast rotary embeddings leave queries and keys in FP32, beside values in bf16.
    query, key = query.to(value.dtype), key.to(value.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_BHQV = BlockedAttention.apply(query, key, value, attention_mask, causal, scale)
    assert isinstance(out_BHQV, torch.Tensor)
    return out_BHQV.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Block:
    """Queries ``first:last``, which see keys ``start:stop``; ``allowed`` (B or 1, 1, 1, C, K) is None where all do."""

    first: int
    last: int
    start: int
    stop: int
    allowed: torch.Tensor | None


def blocks(mask_B1QK: torch.Tensor | None, causal: bool, num_queries: int, num_keys: int) -> Iterator[Block]:
    """The blocks of queries with what each sees: keys that none of a block's queries may see are left out."""
    for first in range(0, num_queries, BLOCK_QUERIES):
        last = min(first + BLOCK_QUERIES, num_queries)
        start, stop, allowed = 0, num_keys, None
        if mask_B1QK is not None:
            rows_B1CK = mask_B1QK[:, :, first:last]
            seen = rows_B1CK.flatten(0, 2).any(dim=0).nonzero()
            if len(seen):
                start, stop = int(seen[0]), int(seen[-1]) + 1
            allowed = rows_B1CK[..., start:stop].unsqueeze(2)
            allowed = None if allowed.all() else allowed
        elif causal:
            stop = last
            allowed = torch.ones(last - first, stop, dtype=torch.bool).tril(first)[None, None, None]
        yield Block(first, last, start, stop, allowed)


class BlockedAttention(torch.autograd.Function):
    """(query (B, H, Q, D), key (B, G, K, D), value (B, G, K, V), mask, causal, scale) -> (B, H, Q, V)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        query, key, value, mask_B1QK, causal, scale = arguments
        query_BGRQD = query.reshape(query.shape[0], key.shape[1], -1, *query.shape[2:])
        key_NKD, value_NKV = key.flatten(0, 1), value.flatten(0, 1)
        out_BGRQV = query.new_empty(*query_BGRQD.shape[:-1], value.shape[-1])
        kept = []
        for block in blocks(mask_B1QK, causal, query.shape[2], key.shape[2]):
            probabilities_NCK = _probabilities(_rows(query_BGRQD, block), key_NKD, block, query_BGRQD.shape, scale)
            rows = _of_rows(out_BGRQV, block)
            rows.copy_(torch.bmm(probabilities_NCK, value_NKV[:, block.start : block.stop]).view(rows.shape))
            if key.shape[2] <= KEEP_UP_TO_KEYS:
                kept.append(probabilities_NCK)
        ctx.save_for_backward(query, key, value, mask_B1QK, *kept)
        ctx.causal, ctx.scale = causal, scale
        return out_BGRQV.view(*query.shape[:-1], value.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask_B1QK, *kept = ctx.saved_tensors
        query_BGRQD = query.reshape(query.shape[0], key.shape[1], -1, *query.shape[2:])
        key_NKD, value_NKV = key.flatten(0, 1), value.flatten(0, 1)
        gradient_BGRQV = gradients[0].reshape(*query_BGRQD.shape[:-1], value.shape[-1])
        query_gradient = torch.empty_like(query_BGRQD)
        key_gradient_NKD, value_gradient_NKV = torch.zeros_like(key_NKD), torch.zeros_like(value_NKV)
        for number, block in enumerate(blocks(mask_B1QK, ctx.causal, query.shape[2], key.shape[2])):
            query_NCD, gradient_NCV = _rows(query_BGRQD, block), _rows(gradient_BGRQV, block)
            if kept:
                probabilities_NCK = kept[number]
            else:
                probabilities_NCK = _probabilities(query_NCD, key_NKD, block, query_BGRQD.shape, ctx.scale)
            seen = slice(block.start, block.stop)
            value_gradient_NKV[:, seen].baddbmm_(probabilities_NCK.mT, gradient_NCV)
            gradient_NCK = torch.bmm(gradient_NCV, value_NKV[:, seen].mT)
            gradient_NCK = torch.ops.aten._softmax_backward_data(gradient_NCK, probabilities_NCK, -1, query.dtype)
            key_gradient_NKD[:, seen].baddbmm_(gradient_NCK.mT, query_NCD, alpha=ctx.scale)
            rows = _of_rows(query_gradient, block)
            rows.copy_(_scaled_bmm(gradient_NCK, key_NKD[:, seen], ctx.scale).view(rows.shape))
        return (
            query_gradient.view(query.shape),
            key_gradient_NKD.view(key.shape),
            value_gradient_NKV.view(value.shape),
            None,
            None,
            None,
        )


def _of_rows(tensor_BGRQX: torch.Tensor, block: Block) -> torch.Tensor:
    return tensor_BGRQX[:, :, :, block.first : block.last]


def _rows(tensor_BGRQX: torch.Tensor, block: Block) -> torch.Tensor:
    """A block's rows (B·G, R·C, X): heads that share keys lie below one another, so that keys are never repeated."""
    return _of_rows(tensor_BGRQX, block).flatten(2, 3).flatten(0, 1)


def _probabilities(
    query_NCD: torch.Tensor, key_NKD: torch.Tensor, block: Block, shape_BGRQD: torch.Size, scale: float
) -> torch.Tensor:
    scores_NCK = _scaled_bmm(query_NCD, key_NKD[:, block.start : block.stop].mT, scale)
    if block.allowed is not None:
        scores = scores_NCK.view(*shape_BGRQD[:3], block.last - block.first, block.stop - block.start)
        scores.masked_fill_(~block.allowed, torch.finfo(scores.dtype).min)
    return torch.softmax(scores_NCK, dim=-1)


def _scaled_bmm(left_NXY: torch.Tensor, right_NYZ: torch.Tensor, scale: float) -> torch.Tensor:
    nothing = left_NXY.new_empty(left_NXY.shape[0], left_NXY.shape[1], right_NYZ.shape[2])
    return torch.baddbmm(nothing, left_NXY, right_NYZ, beta=0, alpha=scale)
