"""Tensor parallelism whose residual stream is divided by tokens (Korthikanti et al. 2022, sequence-parallel norms).

What others reduce to all devices is here reduced to each token's own device, which adds, normalises and sends it on:
as many bytes as a two-step all-reduce, less to compute, and codecs round what blocks read and write, not what is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isthmus.inference.layer import Layer
from isthmus.inference.model import LocalModel
from isthmus.inference.strategies.base import Strategy, Tokens
from isthmus.planning.shares import divide
from isthmus.spec.transformer import Range
from isthmus.transport.base import Group


class ScatteredTensorParallel(Strategy):
    """Device r keeps a share of the tokens that is proportional to ``weights[r]``, and computes its heads and columns
    of all of them."""

    def __init__(
        self, model: LocalModel, group: Group, *, weights: tuple[float, ...], codec: str | None = None
    ) -> None:
        """``codec`` is what blocks' inputs and partial sums are sent in."""
        super().__init__(model)
        self._group, self._weights, self._codec = group, weights, codec

    def token_ranges(self, num_tokens: int) -> list[Range]:
        return divide(num_tokens, self._weights)

    def run(self, tokens: Tokens) -> Tensor:
        batch, num_tokens = tokens.ids_BT.shape
        sizes = [len(part) for part in self.token_ranges(num_tokens)]
        own = self.token_ranges(num_tokens)[self._group.rank]
        positions_Bt = tokens.positions_BT[:, own.start : own.stop]
        hidden_BtH = self.model.embed(tokens.ids_BT[:, own.start : own.stop], positions_Bt)
        rotation = self.model.rotation(tokens.positions_BT)
        allowed, is_plainly_causal = tokens.mask(self.model.spec)
        gathered = [torch.empty(batch, size, self.model.spec.hidden_size) for size in sizes]

        def together(x_BtH: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
            """``compute`` of all tokens, summed over devices, of this device's tokens."""
            self._group.all_gather(gathered, x_BtH.contiguous(), codec=self._codec)
            parts = [part.contiguous() for part in compute(torch.cat(gathered, dim=1)).split(sizes, dim=1)]
            total_BtH = torch.empty_like(parts[self._group.rank])
            self._group.reduce_scatter(total_BtH, parts, codec=self._codec)
            return total_BtH

        for layer in self.model.layers:

            def attention(x_BTH: Tensor, layer: Layer = layer) -> Tensor:
                return layer.attend(*layer.project(x_BTH, rotation), allowed, is_plainly_causal)

            hidden_BtH = self._layer(
                layer,
                hidden_BtH,
                lambda x_BtH, attention=attention: together(x_BtH, attention),
                lambda x_BtH, layer=layer: together(x_BtH, layer.mlp),
            )
        return self._finish(hidden_BtH)
