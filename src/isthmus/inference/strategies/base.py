"""The seam: how several devices compute one forward pass. One file per strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.inference.layer import Layer, Norm
from isthmus.inference.model import LocalModel
from isthmus.spec.transformer import Range, TransformerSpec


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A batch: ``ids_BT`` int64, padded; ``attended_BT`` bool is False for padding, ``positions_BT`` int64."""

    ids_BT: Tensor
    attended_BT: Tensor
    positions_BT: Tensor

    @classmethod
    def of(cls, ids_BT: Tensor, attended_BT: Tensor | None = None, *, is_decoder: bool = False) -> Tokens:
        """A whole batch. Positions count from 0; a decoder's from its first token that is not padding."""
        attended_BT = torch.ones_like(ids_BT, dtype=torch.bool) if attended_BT is None else attended_BT.bool()
        if is_decoder:
            positions_BT = (attended_BT.long().cumsum(dim=1) - 1).clamp(min=0)
        else:
            positions_BT = torch.arange(ids_BT.shape[1]).expand(ids_BT.shape)
        return cls(ids_BT=ids_BT, attended_BT=attended_BT, positions_BT=positions_BT)

    def allowed(self, queries: Range, *, is_causal: bool, window: int | None = None) -> Tensor | None:
        """Which keys (all of the batch) ``queries`` see: bool (B, 1, T, K), or None for all of them."""
        if not is_causal and self.attended_BT.all():
            return None
        allowed_B1TK = self.attended_BT[:, None, None, :].expand(-1, 1, len(queries), -1)
        if not is_causal:
            return allowed_B1TK
        query, key = torch.arange(queries.start, queries.stop)[:, None], torch.arange(self.ids_BT.shape[1])
        seen_TK = key <= query
        if window is not None:
            seen_TK &= key > query - window
        # Padding sees itself: a row without any key would be undefined.
        return (allowed_B1TK & seen_TK) | (key == query)

    def mask(self, spec: TransformerSpec) -> tuple[Tensor | None, bool]:
        """What ``Layer.attend`` takes of it for all tokens: ``allowed``, and whether each sees all before it."""
        num_tokens, window = self.ids_BT.shape[1], spec.sliding_window
        if spec.is_decoder and (window is None or num_tokens <= window) and bool(self.attended_BT.all()):
            return None, True
        return self.allowed(Range(start=0, stop=num_tokens), is_causal=spec.is_decoder, window=window), False

    def part(self, sequences: Range) -> Tokens:
        """Some of the batch."""
        rows = slice(sequences.start, sequences.stop)
        return Tokens(
            ids_BT=self.ids_BT[rows], attended_BT=self.attended_BT[rows], positions_BT=self.positions_BT[rows]
        )


class Strategy(ABC):
    """One way of dividing the work. ``run`` is called on every device with the same tokens."""

    def __init__(self, model: LocalModel) -> None:
        self.model = model

    def token_ranges(self, num_tokens: int) -> list[Range] | None:
        """Which of a batch's tokens each device has after ``run``; None where every device has all."""
        return None

    @abstractmethod
    def run(self, tokens: Tokens) -> Tensor:
        """Hidden states (B, t, H) of this device's tokens after the last layer and norm. Blocks on the others."""

    def _finish(self, hidden_BTH: Tensor) -> Tensor:
        return hidden_BTH if self.model.final_norm is None else self.model.final_norm(hidden_BTH)

    def _block(
        self, hidden_BTH: Tensor, norm: Norm, compute: Callable[[Tensor], Tensor], bias: Tensor | None
    ) -> Tensor:
        """One residual block. ``compute`` gives the sum over all devices, without its bias."""
        total_BTH = compute(norm(hidden_BTH) if self.model.spec.norm_first else hidden_BTH)
        return self._add(hidden_BTH, total_BTH, norm, bias)

    def _add(self, hidden_BTH: Tensor, total_BTH: Tensor, norm: Norm, bias: Tensor | None) -> Tensor:
        """How a residual block ends."""
        if bias is not None:
            total_BTH = total_BTH + bias
        hidden_BTH = hidden_BTH + total_BTH
        return hidden_BTH if self.model.spec.norm_first else norm(hidden_BTH)

    def _layer(
        self,
        layer: Layer,
        hidden_BTH: Tensor,
        attention: Callable[[Tensor], Tensor],
        mlp: Callable[[Tensor], Tensor],
    ) -> Tensor:
        hidden_BTH = self._block(hidden_BTH, layer.norm1, attention, layer.o_bias)
        return self._block(hidden_BTH, layer.norm2, mlp, layer.down_bias)
