"""Tensor parallelism (Megatron-LM, Shoeybi et al. 2019): heads and MLP columns are divided, two all-reduces a layer.

On one device there is nothing to reduce, and this is plain inference.
"""

from __future__ import annotations

from torch import Tensor

from isthmus.inference.model import LocalModel
from isthmus.inference.strategies.base import Strategy, Tokens
from isthmus.spec.transformer import Range
from isthmus.transport.base import Algorithm, Group


class TensorParallel(Strategy):
    """Every device has all tokens' hidden states, and computes its heads and columns of each."""

    def __init__(
        self,
        model: LocalModel,
        group: Group | None,
        *,
        codec: str | None = None,
        algorithm: Algorithm = "two_step",
    ) -> None:
        """``group`` None: this device is alone. ``codec`` is what the partial sums are sent in."""
        super().__init__(model)
        self._group, self._codec = group, codec
        self._algorithm: Algorithm = algorithm

    def run(self, tokens: Tokens) -> Tensor:
        spec = self.model.spec
        hidden_BTH = self.model.embed(tokens.ids_BT, tokens.positions_BT)
        rotation = self.model.rotation(tokens.positions_BT)
        queries = Range(start=0, stop=tokens.ids_BT.shape[1])
        allowed = tokens.allowed(queries, is_causal=spec.is_decoder, window=spec.sliding_window)

        for layer in self.model.layers:

            def attention(x_BTH: Tensor, layer=layer) -> Tensor:
                return self._sum(layer.attend(*layer.project(x_BTH, rotation), allowed, False))

            def mlp(x_BTH: Tensor, layer=layer) -> Tensor:
                return self._sum(layer.mlp(x_BTH))

            hidden_BTH = self._layer(layer, hidden_BTH, attention, mlp)
        return self._finish(hidden_BTH)

    def _sum(self, partial_BTH: Tensor) -> Tensor:
        if self._group is not None:
            partial_BTH = partial_BTH.contiguous()
            self._group.all_reduce(partial_BTH, codec=self._codec, algorithm=self._algorithm)
        return partial_BTH
