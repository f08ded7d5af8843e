"""Tensor parallelism (Megatron-LM, Shoeybi et al. 2019): heads and MLP columns are divided, two all-reduces a layer.

On one device there is nothing to reduce, and this is plain inference.
"""

from __future__ import annotations

from torch import Tensor

from isthmus.inference.kv_cache import KVCache
from isthmus.inference.model import LocalModel
from isthmus.inference.strategies.base import Strategy, Tokens
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
        self.group, self.codec = group, codec
        self._algorithm: Algorithm = algorithm

    def run(self, tokens: Tokens, cache: KVCache | None = None) -> Tensor:
        """``cache``: where the keys and values of a prompt are kept for the tokens that follow."""
        hidden_BTH = self.model.embed(tokens.ids_BT, tokens.positions_BT)
        return self._finish(self.transform(tokens, hidden_BTH, cache))

    def transform(self, tokens: Tokens, hidden_BTH: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the layers make of ``hidden_BTH``."""
        rotation = self.model.rotation(tokens.positions_BT)
        allowed, is_plainly_causal = tokens.mask(self.model.spec)

        for number, layer in enumerate(self.model.layers):

            def attention(x_BTH: Tensor, number=number, layer=layer) -> Tensor:
                query, key, value = layer.project(x_BTH, rotation)
                if cache is not None:
                    cache.fill(number, layer.as_cached(key, 1), layer.as_cached(value, 1))
                return self.sum(layer.attend(query, key, value, allowed, is_plainly_causal))

            def mlp(x_BTH: Tensor, layer=layer) -> Tensor:
                return self.sum(layer.mlp(x_BTH))

            hidden_BTH = self._layer(layer, hidden_BTH, attention, mlp)
        return hidden_BTH

    def sum(self, partial: Tensor, algorithm: Algorithm | None = None) -> Tensor:
        """The sum over all devices, which may overwrite ``partial``. ``algorithm`` None: this strategy's own."""
        if self.group is not None:
            partial = partial.contiguous()
            self.group.all_reduce(partial, codec=self.codec, algorithm=algorithm or self._algorithm)
        return partial
