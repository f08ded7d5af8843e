"""Sequence parallelism: devices hold all weights and compute a range of the tokens each; keys and values are gathered.

One exchange a layer, of 2·T·H values where keys have as many heads as queries (Ring Attention and Voltage divide work
in the same way).
"""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.inference.layer import Layer
from isthmus.inference.model import LocalModel
from isthmus.inference.strategies.base import Strategy, Tokens
from isthmus.planning.shares import divide
from isthmus.spec.transformer import Range
from isthmus.transport.base import Group


class SequenceParallel(Strategy):
    """Device r computes a share of the tokens that is proportional to ``weights[r]``."""

    def __init__(
        self, model: LocalModel, group: Group, *, weights: tuple[float, ...] | None = None, codec: str | None = None
    ) -> None:
        """``codec`` is what keys and values are sent in."""
        super().__init__(model)
        self._group, self._codec = group, codec
        self._weights = weights or (1.0,) * group.world_size

    def token_ranges(self, num_tokens: int) -> list[Range]:
        return divide(num_tokens, self._weights)

    def run(self, tokens: Tokens) -> Tensor:
        spec = self.model.spec
        ranges = self.token_ranges(tokens.ids_BT.shape[1])
        own = ranges[self._group.rank]
        positions_Bt = tokens.positions_BT[:, own.start : own.stop]
        hidden_BtH = self.model.embed(tokens.ids_BT[:, own.start : own.stop], positions_Bt)
        rotation = self.model.rotation(positions_Bt)
        allowed = tokens.allowed(own, is_causal=spec.is_decoder, window=spec.sliding_window)
        gathered = self._buffers(tokens.ids_BT.shape[0], ranges)

        for layer in self.model.layers:

            def attention(x_BtH: Tensor, layer: Layer = layer) -> Tensor:
                query, key, value = layer.project(x_BtH, rotation)
                self._group.all_gather(gathered, torch.stack((key, value)), codec=self._codec)
                key, value = torch.cat(gathered, dim=3)
                return layer.attend(query, key, value, allowed, False)

            hidden_BtH = self._layer(layer, hidden_BtH, attention, layer.mlp)
        return self._finish(hidden_BtH)

    def _buffers(self, batch: int, ranges: list[Range]) -> list[Tensor]:
        """Where each device's keys and values land: (2, B, G, t, D)."""
        spec = self.model.spec
        return [torch.empty(2, batch, spec.num_kv_heads, len(part), spec.head_size) for part in ranges]
