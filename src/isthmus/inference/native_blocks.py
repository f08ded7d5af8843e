"""A decoder's layers for one more token of each sequence by ``decode.c``: what its calls point to.

Shapes: B batch, H hidden size, T positions, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from isthmus.inference.kernels import ACTIVATIONS, NORMS, CLayer, CLinear, CNorm, CShape, CToken, Kernels, address
from isthmus.inference.kv_cache import KVCache
from isthmus.inference.layer import Layer, Norm
from isthmus.inference.linear import Linear, RowsLinear


class NativeBlocks:
    """One request's. ``blocks`` are attention and MLP of all layers in turn, to be called while this lives. Each reads
    ``hidden_BH`` and writes this device's part to ``part_BH``; with ``adds``, for which the two are one tensor, it adds
    that and the bias."""

    def __init__(
        self,
        layers: list[Layer],
        cache: KVCache,
        kernels: Kernels,
        hidden_BH: Tensor,
        part_BH: Tensor,
        *,
        adds: bool,
        positions_B1: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> None:
        """``positions_B1`` (int64) are read when a block is called, too. ``rotary``: cos (T, D), and sin with a
        negative first half."""
        first, batch = layers[0], len(hidden_BH)
        linears = [_native(linear) for linear in (first.qkv, first.o, first.up, first.down)]
        widths = [each.columns for each in linears] + [linears[0].rows, linears[2].rows]
        self._cache = cache
        self._scratch = torch.empty(batch * sum(widths) + cache.capacity)
        self._narrowed = torch.empty(batch * max(widths), dtype=torch.int16)
        self._sources = torch.tensor(first.cached_sources)
        self._kept = (hidden_BH, part_BH, positions_B1, rotary)
        cos_TD, sin_TD = rotary or (None, None)
        self._token = CToken(
            batch=batch,
            capacity=cache.capacity,
            positions=address(positions_B1),
            cos=address(cos_TD),
            sin=address(sin_TD),
            mask=address(cache.mask_B11C),
            scratch=address(self._scratch),
            narrowed=address(self._narrowed),
        )
        self._shape = _shape(first, self._sources)
        self._layers = [_layer(layer) for layer in layers]
        hidden, part = address(hidden_BH), address(part_BH)

        def bind() -> Iterator[Callable[[], None]]:
            shape, token = ctypes.byref(self._shape), ctypes.byref(self._token)
            for number, layer in enumerate(map(ctypes.byref, self._layers)):
                cached = address(cache.of_layer(number))
                yield lambda layer=layer, cached=cached: kernels.attention(
                    shape, layer, token, cached, hidden, part, adds
                )
                yield lambda layer=layer: kernels.mlp(shape, layer, token, hidden, part, adds)

        self.blocks = list(bind())

    def next_token(self) -> None:
        """Makes room for one more token of each sequence."""
        self._token.slot, self._token.used = self._cache.next_slot()


def _shape(layer: Layer, sources: Tensor) -> CShape:
    spec = layer.spec
    return CShape(
        hidden=layer.width,
        heads=len(layer.share.heads),
        kv_heads=len(layer.kv_heads),
        cached_heads=layer.num_cached_heads,
        head_size=spec.head_size,
        columns=len(layer.share.columns),
        norm=NORMS[spec.norm],
        activation=ACTIVATIONS[spec.activation],
        has_gate=spec.has_gate,
        kv_of_cached=address(sources),
        epsilon=spec.norm_epsilon,
    )


def _layer(layer: Layer) -> CLayer:
    return CLayer(
        *(_native(linear) for linear in (layer.qkv, layer.o, layer.up, layer.down)),
        *(_norm(norm) for norm in (layer.norm1, layer.norm2)),
        *(None if norm is None else address(norm.weight) for norm in (layer.q_norm, layer.k_norm)),
        *(address(bias) for bias in (layer.o_bias, layer.down_bias)),
    )


def _norm(norm: Norm) -> CNorm:
    return CNorm(address(norm.weight), address(norm.bias))


def _native(linear: Linear) -> CLinear:
    assert isinstance(linear, RowsLinear)
    return linear.native
