"""Dividing countable things (tokens, heads, columns) among devices in proportion to what each can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from isthmus.spec.transformer import LayerShare, Range, SubBlock, TransformerSpec

_MICRO_BATCH_TOKENS = 64


def divide(total: int, weights: Sequence[float], *, unit: int = 1) -> list[Range]:
    """Adjacent ranges that cover ``total``, in proportion to ``weights`` (not negative, not all 0), in whole ``unit``s
    but for the last that is not empty. Largest remainder: no range differs from its quota by a unit or more."""
    if total < 0 or unit < 1 or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"divide: got total {total}, unit {unit}, weights {tuple(weights)}; wanted shares that sum up")
    num_units = -(-total // unit)
    quotas = [num_units * weight / sum(weights) for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda index: (counts[index] - quotas[index], index))
    for index in by_remainder[: num_units - sum(counts)]:
        counts[index] += 1
    ranges, start = [], 0
    for count in counts:
        stop = min(total, start + count * unit)
        ranges.append(Range(start=start, stop=stop))
        start = stop
    return ranges


def micro_batches(batch: int, num_tokens: int) -> list[Range]:
    """Sequences that pass through a pipeline together: few, so that all devices soon have some, but enough tokens for
    products to be fast."""
    size = -(-_MICRO_BATCH_TOKENS // max(1, num_tokens))
    return [Range(start=start, stop=min(batch, start + size)) for start in range(0, batch, size)]


def divide_layer(spec: TransformerSpec, weights: Sequence[float], *, column_unit: int = 16) -> list[LayerShare]:
    """Each device's query heads, MLP columns and words. Heads are divided in whole groups that share a key/value head
    where there are at least as many of those as devices, and one by one otherwise. What heads cannot balance (few, and
    whole), columns make good: they take the devices' total nearest to ``weights``."""
    group = spec.heads_per_kv_head if spec.num_kv_heads >= len(weights) else 1
    heads = divide(spec.num_heads, weights, unit=group)
    per_head = spec.attention_numel / spec.num_heads
    per_column = spec.mlp_numel / spec.intermediate_size
    total = spec.attention_numel + spec.mlp_numel
    wanted = [
        max(0.0, total * weight / sum(weights) - len(part) * per_head) / per_column
        for weight, part in zip(weights, heads, strict=True)
    ]
    columns = divide(spec.intermediate_size, wanted, unit=column_unit)
    words = divide(spec.vocab_size, weights)
    return [LayerShare(heads=h, columns=c, vocabulary=v) for h, c, v in zip(heads, columns, words, strict=True)]


def divide_sub_block(spec: TransformerSpec, block: SubBlock, weights: Sequence[float]) -> list[LayerShare]:
    """Each device's query heads and MLP columns of a sub-block that they have together, as ``divide_layer``."""
    first, num_heads = block.heads.start, len(block.heads)
    num_kv_heads = num_heads // spec.heads_per_kv_head
    own = replace(spec, hidden_size=len(block.units), num_heads=num_heads, num_kv_heads=num_kv_heads, decoupling=None)
    return [
        replace(share, heads=Range(start=first + share.heads.start, stop=first + share.heads.stop))
        for share in divide_layer(own, weights)
    ]
