"""A decoder's forward passes of one request: all of the prompt at once, then one token of each sequence at a time.

Heads and MLP columns are divided as in ``TensorParallel``, which computes the prompt. A single token is a race of
microseconds: few operators, and sums (two a layer) of few messages.

Shapes: B batch, H hidden size, A query heads, G cached heads, K tokens seen, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.inference.kernels import MOST_ROWS
from isthmus.inference.kv_cache import KVCache
from isthmus.inference.layer import Layer
from isthmus.inference.native_blocks import NativeBlocks
from isthmus.inference.strategies.base import Tokens
from isthmus.inference.strategies.tensor_parallel import TensorParallel
from isthmus.planning.exchanges import SMALL_VALUES, token_algorithm
from isthmus.transport.base import Algorithm
from isthmus.transport.repeated import RepeatedSum


class Decoding:
    """One request on this device. Called on every device with the same tokens, in inference mode; blocks on the others.

    ``hidden_BH`` of each sequence's last token, after the final norm, is the same bits on all of them.
    """

    def __init__(self, strategy: TensorParallel, tokens: Tokens, num_new: int) -> None:
        """``tokens``: the prompts, padded on the left. ``num_new``: how often ``step`` may be called."""
        self._strategy, self._tokens = strategy, tokens
        self._model = model = strategy.model
        spec = model.spec
        total = tokens.ids_BT.shape[1] + num_new
        self._cache = KVCache(
            num_layers=len(model.layers),
            num_heads=model.layers[0].num_cached_heads,
            head_size=spec.head_size,
            capacity=min(total, spec.sliding_window or total),
            attended_BT=tokens.attended_BT,
        )
        batch = len(tokens.ids_BT)
        self._biases = [bias for layer in model.layers for bias in (layer.o_bias, layer.down_bias)]
        group = strategy.group
        self._hidden_BH = torch.empty(batch, spec.hidden_size)
        self._add_up: RepeatedSum | None = None
        if group is not None and self._hidden_BH.numel() <= SMALL_VALUES:
            self._add_up = group.repeated_sum(self._hidden_BH.numel())
            self._hidden_BH = self._add_up.values.view(batch, -1)
        self._algorithm: Algorithm | None = token_algorithm(
            self._hidden_BH.numel(), 1 if group is None else group.world_size
        )
        self._is_in_place = group is None or self._add_up is not None
        """Each device's part of a block, with what was there before on the first, takes the place of ``_hidden_BH``."""
        self._is_first = group is None or group.rank == 0
        self._positions_B1 = tokens.positions_BT[:, -1:].clone()
        self._rotary_TD = model.rotary_table(total)
        self._native: NativeBlocks | None = None
        if model.kernels is not None and batch <= MOST_ROWS:
            self._part_BH = self._hidden_BH if self._is_in_place else torch.empty_like(self._hidden_BH)
            self._native = NativeBlocks(
                model.layers,
                self._cache,
                model.kernels,
                self._hidden_BH,
                self._part_BH,
                adds=self._is_in_place and self._is_first,
                positions_B1=self._positions_B1,
                rotary=self._rotary_TD,
            )

    def prefill(self) -> Tensor:
        """``hidden_BH`` after the prompts."""
        return self._strategy.run(self._tokens, self._cache)[:, -1]

    def step(self, ids_B: Tensor) -> Tensor:
        """``hidden_BH`` after one more token of each sequence."""
        self._positions_B1 += 1
        hidden_BH = self._hidden_BH.copy_(self._model.embed(ids_B[:, None], self._positions_B1)[:, 0])
        if self._native is None:
            self._run_layers(hidden_BH)
        else:
            self._native.next_token()
            for block, bias in zip(self._native.blocks, self._biases, strict=True):
                block()
                self._combine(self._part_BH, bias)
        return hidden_BH if self._model.final_norm is None else self._model.final_norm(hidden_BH)

    def _run_layers(self, hidden_BH: Tensor) -> None:
        rotary = None
        if self._rotary_TD is not None:
            rotary = self._rotary_TD[0][self._positions_B1], self._rotary_TD[1][self._positions_B1]
        views, mask_B11K = self._cache.add_token()
        for layer, cached in zip(self._model.layers, views, strict=True):
            self._add(attend_token(layer, layer.norm1(hidden_BH), rotary, cached, mask_B11K), layer.o_bias)
            self._add(layer.mlp(layer.norm2(hidden_BH)), layer.down_bias)

    def _add(self, partial_BH: Tensor, bias: Tensor | None) -> None:
        """Adds the sum of all devices' parts, and the bias, to ``_hidden_BH``."""
        if self._is_in_place:
            if self._is_first:
                self._hidden_BH += partial_BH
                if bias is not None:
                    self._hidden_BH += bias
            else:
                self._hidden_BH.copy_(partial_BH)
        self._combine(partial_BH, bias)

    def _combine(self, partial_BH: Tensor, bias: Tensor | None) -> None:
        """What is left of ``_add`` when each device's part is where it belongs."""
        if self._add_up is not None:
            self._add_up()
        elif not self._is_in_place:
            self._hidden_BH += self._strategy.sum(partial_BH, self._algorithm)
            if bias is not None:
                self._hidden_BH += bias


def attend_token(
    layer: Layer,
    x_BH: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    cached: tuple[Tensor, Tensor, Tensor],
    mask_B11K: Tensor | None,
) -> Tensor:
    """The partial sum (B, H) of attention's output for one token of each sequence, whose key and value it caches."""
    num_heads, num_kv_heads, size = len(layer.share.heads), len(layer.kv_heads), layer.spec.head_size
    if not num_heads:
        return torch.zeros_like(x_BH)
    batch = len(x_BH)
    heads_BND = layer.qkv(x_BH).view(batch, num_heads + 2 * num_kv_heads, size)
    if layer.q_norm is not None and layer.k_norm is not None:
        query, key, value = heads_BND.split((num_heads, num_kv_heads, num_kv_heads), 1)
        heads_BND = torch.cat((layer.q_norm(query), layer.k_norm(key), value), 1)
    if rotary is not None:
        cos_B1D, signed_sin_B1D = rotary
        turned = heads_BND[:, : num_heads + num_kv_heads]
        swapped = turned.view(batch, -1, 2, size // 2).flip(2).view(batch, -1, size)
        turned.mul_(cos_B1D).addcmul_(swapped, signed_sin_B1D)
    new_B2GD, key_BGKD, value_BGKD = cached
    new_B2GD.copy_(layer.as_cached(heads_BND[:, num_heads:].view(batch, 2, num_kv_heads, size), 2))
    # Query heads that share a key head are rows of one product.
    query = heads_BND[:, :num_heads].view(batch, layer.num_cached_heads, -1, size)
    mixed = F.scaled_dot_product_attention(query, key_BGKD, value_BGKD, attn_mask=mask_B11K)
    return layer.o(mixed.reshape(batch, num_heads * size))
