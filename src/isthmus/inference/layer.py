"""One Transformer layer as far as a device holds it: partial attention, partial MLP, and the norms between.

What a device computes of attention or MLP is a *partial sum* of the layer's: those of all devices together, and the
bias that is added once, are the layer's.

A sub-block of a decoupled layer is such a layer too, whose hidden states are its slice: it reads with its columns of
the matrices that read hidden units, writes with its rows of those that write them, and norms over its slice.

Shapes: B batch, T tokens, K keys, H hidden size (a sub-block's: its slice), A query heads and G key/value heads of this
device, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from isthmus.inference.kernels import Kernels
from isthmus.inference.linear import Linear, StackedLinear, SummedLinear, make_linear
from isthmus.models.shards import ShardReader
from isthmus.spec.transformer import LayerShare, Range, SubBlock


class Norm:
    """Layer norm or RMS norm, over the last dimension."""

    def __init__(
        self,
        reader: ShardReader,
        name: str,
        layer: int | None = None,
        *,
        kind: str | None = None,
        units: Range | None = None,
    ) -> None:
        """``units``: those it is over, all by default."""
        self._kind = kind or reader.spec.norm
        self._epsilon = reader.spec.norm_epsilon
        self.weight = reader.read(f"{name}.weight", layer, rows=units)
        self.bias = reader.read(f"{name}.bias", layer, rows=units) if self._kind == "layer" else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._kind == "layer":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self._epsilon)
        if x.numel() == self.weight.numel():  # one token: PyTorch's own takes seven operators
            flat = x.reshape(-1)
            return (x * self.weight).mul_((torch.dot(flat, flat).item() / len(flat) + self._epsilon) ** -0.5)
        return F.rms_norm(x, self.weight.shape, self.weight, self._epsilon)


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """cos and sin of the tokens' rotary angles, (B or 1, 1, T, D)."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x_BATD: Tensor) -> Tensor:
        first, second = x_BATD.chunk(2, dim=-1)
        return x_BATD * self.cos + torch.cat((-second, first), dim=-1) * self.sin


class Layer:
    """The share of layer ``number``, or of one of its sub-blocks, that this device holds, in ``dtype`` (see
    ``linear``)."""

    def __init__(
        self,
        reader: ShardReader,
        number: int,
        share: LayerShare,
        dtype: str,
        kernels: Kernels | None = None,
        *,
        sub_block: SubBlock | None = None,
    ) -> None:
        spec = reader.spec
        self.spec = spec
        units = None if sub_block is None else sub_block.units
        self.width = spec.hidden_size if units is None else len(units)
        self.share = share
        self._parts: tuple[Layer, ...] = ()
        """Of which it is ``joined``."""
        self.kv_heads = share.kv_heads(spec)
        self._activation: Callable[[Tensor], Tensor] = ACT2FN[spec.activation]
        self._kv_index = self._find_kv_index()
        self._is_grouped = self._kv_index is None or len(self.kv_heads) == 1
        self.norm1, self.norm2 = (Norm(reader, name, number, units=units) for name in ("norm1", "norm2"))
        self.q_norm = Norm(reader, "q_norm", number, kind="rms") if spec.has_qk_norm else None
        self.k_norm = Norm(reader, "k_norm", number, kind="rms") if spec.has_qk_norm else None

        def read(parts: list[tuple[str, Range]], columns: Range | None) -> Linear:
            return _read_linear(reader, number, parts, columns, dtype, kernels)

        def write(name: str, columns: Range) -> tuple[Linear, Tensor | None]:
            weight = reader.read(f"{name}.weight", number, rows=units, columns=columns)
            bias = reader.read(f"{name}.bias", number, rows=units) if reader.has(f"{name}.bias", number) else None
            return make_linear(weight, None, dtype, kernels), bias

        query_rows, kv_rows = self._rows(share.heads), self._rows(self.kv_heads)
        # Sub-blocks with heads of their own have narrow matrices, one below the other and as wide as their slice.
        has_own_heads = sub_block is not None and len(sub_block.heads) < spec.num_heads
        own_columns = query_rows if sub_block is None else self._rows(_from(share.heads, sub_block.heads.start))
        self.qkv = read([("q", query_rows), ("k", kv_rows), ("v", kv_rows)], None if has_own_heads else units)
        self.o, self.o_bias = write("o", own_columns)
        ups = [("gate", share.columns)] if spec.has_gate else []
        self.up = read([*ups, ("up", share.columns)], units)
        self.down, self.down_bias = write("down", share.columns)

    @classmethod
    def joined(cls, share: LayerShare, parts: Sequence[Layer]) -> Layer:
        """``share`` of a layer of which ``parts`` have some heads each, in order, or some columns. They keep their
        matrices, and products are theirs. Not for ``decode.c``, nor for heads that share keys and values."""
        layer = copy(parts[0])
        assert layer.spec.heads_per_kv_head == 1
        layer.share, layer.kv_heads = share, share.kv_heads(layer.spec)
        layer._parts = tuple(parts)
        # Heads that no part has any of, the first one has in matrices without rows or columns.
        heads = [part for part in parts if len(part.share.heads)] or parts[:1]
        layer.qkv, layer.o = heads[0].qkv, heads[0].o
        if len(heads) > 1:
            layer.qkv = StackedLinear([part.qkv for part in heads], 3)
            widths = [len(part.share.heads) * layer.spec.head_size for part in heads]
            layer.o = SummedLinear([part.o for part in heads], widths)
        del layer.up, layer.down  # the parts' own
        return layer

    @property
    def num_bytes(self) -> int:
        """Of the matrices."""
        if self._parts:
            return sum(part.num_bytes for part in self._parts)
        return sum(linear.num_bytes for linear in (self.qkv, self.o, self.up, self.down))

    @property
    def num_cached_heads(self) -> int:
        """Key/value heads as a cache keeps them (``as_cached``)."""
        return len(self.kv_heads) if self._is_grouped else len(self.share.heads)

    @property
    def cached_sources(self) -> list[int]:
        """Which of this device's key/value heads each of the cached ones is."""
        if self._is_grouped or self._kv_index is None:
            return list(range(len(self.kv_heads)))
        return self._kv_index.tolist()

    def as_cached(self, key: Tensor, dim: int) -> Tensor:
        """Keys or values with heads along ``dim`` as a cache keeps them: once each, where as many query heads use each
        of them, or else once for every query head."""
        return key if self._is_grouped or self._kv_index is None else key.index_select(dim, self._kv_index)

    def project(self, x_BTH: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """query (B, A, T, D), key and value (B, G, T, D) of this device's heads, positions applied."""
        return self.separate(self.qkv(x_BTH), rotation)

    def separate(self, product_BTX: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """As ``project``, of what ``qkv`` gives."""
        num_heads, num_kv_heads, size = len(self.share.heads), len(self.kv_heads), self.spec.head_size
        counts = (num_heads, num_kv_heads, num_kv_heads)
        parts = product_BTX.split([count * size for count in counts], dim=-1)
        query, key, value = (
            part.unflatten(-1, (count, size)).transpose(1, 2) for part, count in zip(parts, counts, strict=True)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotation(query), rotation(key)
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, is_causal: bool) -> Tensor:
        """The partial sum (B, T, H) of attention's output, without its bias.

        ``allowed``: bool (B or 1, 1, T, K), or None for all, or with ``is_causal`` for all up to the query.
        """
        group = self.spec.heads_per_kv_head
        if not len(self.share.heads):
            return query.new_zeros(query.shape[0], query.shape[2], self.width)
        if self._kv_index is not None:
            key, value = key[:, self._kv_index], value[:, self._kv_index]
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, is_causal=is_causal, enable_gqa=group > 1 and self._kv_index is None
        )
        return self.o(mixed.transpose(1, 2).flatten(2))

    def mlp(self, x_BTH: Tensor) -> Tensor:
        """The partial sum (B, T, H) of the MLP's output, without its bias."""
        if not len(self.share.columns):
            return torch.zeros_like(x_BTH)
        if self._parts:
            first, *others = (part.mlp(x_BTH) for part in self._parts if len(part.share.columns))
            for other in others:
                first += other
            return first
        up = self.up(x_BTH)
        if not self.spec.has_gate:
            return self.down(self._activation(up))
        gate, up = up.chunk(2, dim=-1)
        return self.down(self._activation(gate) * up)

    def _rows(self, heads: Range) -> Range:
        return Range(start=heads.start * self.spec.head_size, stop=heads.stop * self.spec.head_size)

    def _find_kv_index(self) -> Tensor | None:
        """The local key/value head of each query head, where they do not lie in whole groups."""
        group, heads = self.spec.heads_per_kv_head, self.share.heads
        if group == 1 or (heads.start % group == 0 and heads.stop % group == 0):
            return None
        return torch.arange(heads.start, heads.stop) // group - self.kv_heads.start


def _from(heads: Range, first: int) -> Range:
    return Range(start=heads.start - first, stop=heads.stop - first)


def _read_linear(
    reader: ShardReader,
    layer: int,
    parts: list[tuple[str, Range]],
    columns: Range | None,
    dtype: str,
    kernels: Kernels | None,
) -> Linear:
    """Matrices one below the other, so that one product gives all of them."""
    weight = torch.cat([reader.read(f"{name}.weight", layer, rows=rows, columns=columns) for name, rows in parts])
    has_bias = reader.has(f"{parts[0][0]}.bias", layer)
    bias = torch.cat([reader.read(f"{name}.bias", layer, rows=rows) for name, rows in parts]) if has_bias else None
    return make_linear(weight, bias, dtype, kernels)
